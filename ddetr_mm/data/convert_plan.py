"""The order in which a conversion reads and writes: sequences, partitions, shards, chunks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ddetr_mm.data.class_mapping import (
    DEFAULT_CLASS_MAPPING,
    category_ids,
    check_class_mapping,
    load_class_mapping,
)
from ddetr_mm.data.conversion_problems import FoundProblem
from ddetr_mm.data.convert_options import STATS_NAME, WARNINGS_NAME, ConvertOptions
from ddetr_mm.data.kitti_chunk import Chunk, ReadingRules
from ddetr_mm.data.kitti_sequences import KittiSequence, list_images, read_sequences
from ddetr_mm.data.name_list import NameList
from ddetr_mm.data.shards import assign_sequences, split_evenly, validation_mask
from ddetr_mm.errors import DataError, Problem

_IMAGES_PER_CHUNK = 256
_REMEMBERED_NAMES = 200_000
_RESERVED_NAMES = (STATS_NAME, WARNINGS_NAME, "status.json")


@dataclass(frozen=True)
class Step:
    """A chunk on its way: where its content goes, and what else is due with it.

    Attributes:
        sequence: index of the sequence.
        partition, shard: the shard that the chunk is part of.
        names: image files of the chunk.
        repeats: whether these images are written for a second time.
        ends_shard: nothing follows in this shard.
        problems: found while listing; to be reported before those of the chunk.
        ends_sequence: all images of the sequence when nothing follows in it.
    """

    sequence: int
    partition: int
    shard: int
    names: list[str]
    repeats: bool = False
    ends_shard: bool = False
    problems: Sequence[FoundProblem] = ()
    ends_sequence: NameList | None = None


class Plan:
    """What will be converted: sequences, categories, and the order of all chunks."""

    def __init__(self, options: ConvertOptions) -> None:
        self.options = options
        mapping = _class_mapping(options)
        self.category_ids = category_ids(mapping.values())
        self.rules = ReadingRules(
            category_of_class={name: self.category_ids[category] for name, category in mapping.items()},
            image_extension=options.image_extension,
            decode_images=options.decode_images,
        )
        self.sequences = read_sequences(
            options.input_source, options.data_root, options.image_dir_name, options.label_dir_name
        )
        _check_names(self.sequences, options.input_source)
        self._remembered: dict[int, tuple[NameList, NameList]] = {}
        self.num_images = self._count_images()
        self.total = sum(self.num_images)
        if self.total == 0:
            ending = options.image_extension or "any common image extension"
            raise DataError(
                Problem(
                    f"none of the listed sequences has an image with {ending}",
                    file=options.input_source,
                    mend="check image_dir_name and image_extension",
                )
            )
        self.partitions = self._partitions_of_sequences()

    def _count_images(self) -> list[int]:
        counts = []
        free = _REMEMBERED_NAMES
        for index in range(len(self.sequences)):
            listed = self._list(index)
            counts.append(len(listed[0]))
            free -= len(listed[0])
            if free >= 0:
                self._remembered[index] = listed
        return counts

    def _list(self, index: int) -> tuple[NameList, NameList]:
        """Images and left-out duplicates of a sequence; what is remembered is then forgotten."""
        if index in self._remembered:
            return self._remembered.pop(index)
        return list_images(self.sequences[index], self.options.image_extension)

    def _partitions_of_sequences(self) -> list[list[int]]:
        """The partitions that each sequence has shards in."""
        options = self.options
        if options.partition_mode != "sequence":
            return [list(range(options.num_partitions))] * len(self.sequences)
        if options.num_partitions > len(self.sequences):
            raise DataError(
                Problem(
                    "more partitions than sequences",
                    where="num_partitions",
                    value=options.num_partitions,
                    allowed=f"at most {len(self.sequences)} with partition_mode sequence",
                )
            )
        shares = [1.0] * options.num_partitions
        if options.num_partitions == 2 and options.val_split > 0:
            shares = [options.val_split, 100 - options.val_split]
        return [[partition] for partition in assign_sequences(self.num_images, shares)]

    def steps(self) -> Iterator[Step]:
        """All chunks in the order of writing."""
        for index, sequence in enumerate(self.sequences):
            names, duplicates = self._list(index)
            problems = [
                FoundProblem(
                    "duplicate_name", sequence.image_prefix + name, 0, "same name as an earlier image"
                )
                for name in duplicates.part(0, len(duplicates))
            ]
            if not len(names):
                problems.append(FoundProblem("no_images", sequence.image_prefix, 0, "no image"))
            shards = list(itertools.product(self.partitions[index], range(self.options.num_shards)))
            chunks = itertools.chain.from_iterable(
                self._partition_steps(index, partition, names) for partition in self.partitions[index]
            )
            for step in chunks:
                last = step.ends_shard and (step.partition, step.shard) == shards[-1]
                yield replace(step, problems=problems, ends_sequence=names if last else None)
                problems = []

    def _partition_steps(self, index: int, partition: int, names: NameList) -> Iterator[Step]:
        options = self.options
        sequence = self.sequences[index].name
        if options.partition_mode == "random":
            is_validation = validation_mask(len(names), options.val_split, f"{options.seed}/{sequence}")
            names = names.take(is_validation if partition == 0 else ~is_validation)
        longest = math.ceil(len(names) / options.num_shards)
        for shard, positions in enumerate(split_evenly(len(names), options.num_shards)):
            num_repeats = longest - len(positions) if options.pad_shards else 0
            starts = positions[::_IMAGES_PER_CHUNK] or [positions.start]  # an empty shard is a step, too
            for start in starts:
                stop = min(start + _IMAGES_PER_CHUNK, positions.stop)
                ends = stop == positions.stop and not num_repeats
                yield Step(index, partition, shard, names.part(start, stop), ends_shard=ends)
            if num_repeats:
                choice = random.Random(f"{options.seed}/{sequence}/{partition}/{shard}")  # noqa: S311
                which = np.array(choice.choices(range(len(names)), k=num_repeats))
                repeats = names.take(which).part(0, num_repeats)
                yield Step(index, partition, shard, repeats, repeats=True, ends_shard=True)

    def chunk(self, step: Step) -> Chunk:
        """The part of a step that a worker needs."""
        sequence = self.sequences[step.sequence]
        return Chunk(
            image_dir=str(sequence.image_dir),
            label_dir=str(sequence.label_dir),
            image_prefix=sequence.image_prefix,
            label_prefix=sequence.label_prefix,
            names=step.names,
            report=not step.repeats,
        )


def _class_mapping(options: ConvertOptions) -> dict[str, str]:
    if options.mapping is not None:
        return check_class_mapping(options.mapping)
    if options.mapping_path is not None:
        return load_class_mapping(options.mapping_path)
    return DEFAULT_CLASS_MAPPING


def _check_names(sequences: Sequence[KittiSequence], input_source: Path) -> None:
    DataError.collect(
        Problem(
            "a sequence cannot have this name, which the results folder needs",
            file=input_source,
            value=sequence.name,
            mend="rename the folder, or list it relative to a data_root further up",
        )
        for sequence in sequences
        if sequence.name.split("/")[0] in _RESERVED_NAMES
    )
