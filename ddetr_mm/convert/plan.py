"""Which images go into which partition and shard."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddetr_mm.convert.kitti import (
    DEFAULT_CLASS_MAPPING,
    category_ids,
    check_class_mapping,
    load_class_mapping,
)
from ddetr_mm.convert.problems import PROBLEM_KINDS, FoundProblem
from ddetr_mm.convert.reader import Chunk, ReadingRules
from ddetr_mm.convert.sequences import KittiSequence, NameList, list_images, read_sequences
from ddetr_mm.errors import DataError, Problem

# --- What a conversion is asked for, and what it reports back ---

PARTITION_MODES = ("random", "sequence")


@dataclass(frozen=True)
class ConvertOptions:
    """A conversion from KITTI folders to sharded COCO JSON.

    Attributes:
        input_source: text file with one sequence folder a line.
        results_dir: folder the shards, ``stats.txt`` and ``warnings.json`` go to.
        data_root: folder the lines of ``input_source`` are relative to; None: the current folder.
        image_dir_name: folder of the images inside each sequence; None: the sequence folder itself.
        label_dir_name: the same for labels.
        num_shards: JSON files per sequence and partition, at least 1.
        num_partitions: 1, 2 with ``random``, any number up to that of the sequences with ``sequence``.
        partition_mode: None: all in one; ``"random"``: each sequence is split into fold 0 (validation) and
            fold 1; ``"sequence"``: every sequence goes as a whole into one partition.
        val_split: percent of the images that go to fold 0, from 0 to 100. With ``"sequence"`` it counts
            only for two partitions and above 0; otherwise those are made equally large.
        image_extension: the only ending that makes a file an image, e.g. ``".jpg"``; None: every common
            image type counts.
        mapping: label class → category.
        mapping_path: JSON file with the same; without either the documentation's default holds.
        strict: stop at the first bad input instead of listing it.
        pad_shards: fill shorter shards with repeated images (chosen by ``seed``) until all shards of a
            partition list equally many.
        num_workers: processes besides the calling one; None: as the size of the task and the machine
            suggest; 0: none.
        seed: fixes random partitions and repeats.
        decode_images: decode every image, which finds damage that headers do not show, at the price of
            most of the speed.
    """

    input_source: Path
    results_dir: Path
    data_root: Path | None = None
    image_dir_name: str | None = None
    label_dir_name: str | None = None
    num_shards: int = 32
    num_partitions: int = 1
    partition_mode: str | None = None
    val_split: float = 0.0
    image_extension: str | None = None
    mapping: Mapping[str, str] | None = None
    mapping_path: Path | None = None
    strict: bool = False
    pad_shards: bool = False
    num_workers: int | None = None
    seed: int = 0
    decode_images: bool = False

    def check(self) -> None:
        """Check every field that can be checked without looking at the disk.

        Raises:
            DataError: with all faults at once.
        """
        faults: list[Problem] = []
        if self.num_shards < 1:
            faults.append(Problem("too few", where="num_shards", value=self.num_shards, allowed="1 or more"))
        if not 0 <= self.val_split <= 100:
            faults.append(
                Problem("not a percentage", where="val_split", value=self.val_split, allowed="0 to 100")
            )
        if self.num_workers is not None and self.num_workers < 0:
            faults.append(
                Problem("negative", where="num_workers", value=self.num_workers, allowed="0 or more")
            )
        if self.image_extension is not None and (not self.image_extension or "/" in self.image_extension):
            faults.append(
                Problem(
                    "is no file name ending",
                    where="image_extension",
                    value=self.image_extension,
                    allowed="for example .jpg, or null for every common image type",
                )
            )
        faults.extend(self._partition_faults())
        DataError.collect(faults)

    def _partition_faults(self) -> list[Problem]:
        number = self.num_partitions
        if self.partition_mode not in (None, *PARTITION_MODES):
            allowed = ("null", *PARTITION_MODES)
            return [
                Problem(
                    "is not an option", where="partition_mode", value=self.partition_mode, allowed=allowed
                )
            ]
        if self.partition_mode is None and number != 1:
            hint = "set partition_mode to random or sequence to get several partitions"
            return [
                Problem(
                    "needs a partition_mode", where="num_partitions", value=number, allowed="1", hint=hint
                )
            ]
        if self.partition_mode == "random" and number != 2:
            what = "does not fit partition_mode random, which makes a validation and a training fold"
            return [Problem(what, where="num_partitions", value=number, allowed="2")]
        if number < 1:
            return [Problem("too few", where="num_partitions", value=number, allowed="1 or more")]
        return []


@dataclass(frozen=True)
class ShardReport:
    """One shard: its path relative to the results folder, and which numbers it holds."""

    file: str
    partition: int
    num_images: int
    num_annotations: int
    first_image_id: int
    first_annotation_id: int


@dataclass
class SequenceReport:
    """One sequence.

    Attributes:
        name: as in ``file_name`` and in the shards' paths.
        image_root: the folder that the ``file_name`` of its images is relative to.
        num_images: images written (repeats included).
        num_annotations: boxes written.
        first_image_id: ids of its images begin here.
        first_annotation_id: ids of its boxes begin here.
        shards: in the order of writing.
    """

    name: str
    image_root: Path
    num_images: int
    num_annotations: int
    first_image_id: int
    first_annotation_id: int
    shards: list[ShardReport] = field(default_factory=list)


@dataclass
class ConvertReport:
    """What a finished conversion has done.

    Attributes:
        results_dir: where the files are.
        num_images: images written (repeats included).
        num_annotations: boxes written.
        category_ids: category → id.
        boxes_per_category: category → number of boxes.
        sequences: in the order of ``input_source``.
        problem_counts: kind of problem → how often it was met.
        unknown_classes: class without a mapping → number of lines dropped for it.
        seconds: time taken.
    """

    results_dir: Path
    num_images: int
    num_annotations: int
    category_ids: dict[str, int]
    boxes_per_category: dict[str, int]
    sequences: list[SequenceReport]
    problem_counts: dict[str, int]
    unknown_classes: dict[str, int]
    seconds: float

    @property
    def shard_paths(self) -> list[Path]:
        """Every shard, in the order of writing."""
        return [self.results_dir / shard.file for sequence in self.sequences for shard in sequence.shards]

    @property
    def stats_path(self) -> Path:
        """The file with counts and offsets."""
        return self.results_dir / STATS_NAME

    @property
    def warnings_path(self) -> Path:
        """The file that lists every problem."""
        return self.results_dir / WARNINGS_NAME

    @property
    def images_per_second(self) -> float:
        """Speed of the whole conversion."""
        return self.num_images / self.seconds if self.seconds else math.inf

    def warning_lines(self) -> list[str]:
        """One line for each kind of problem met, the most frequent first; empty when all was well."""
        by_number = sorted(self.problem_counts.items(), key=lambda item: (-item[1], item[0]))
        return [f"{number:,} x {PROBLEM_KINDS[kind]} ({kind})" for kind, number in by_number]


STATS_NAME = "stats.txt"
WARNINGS_NAME = "warnings.json"


# --- Which image goes into which partition and shard, what the files are called, and writing one ---
# The planning functions are pure and depend on nothing but their arguments, so that the same input gives
# the same files on every machine.

_SPOOL_BYTES = 16 * 2**20
_encoder = msgspec.json.Encoder()


def split_evenly(num_items: int, num_parts: int) -> list[range]:
    """Cut ``range(num_items)`` into ``num_parts`` ranges whose lengths differ by at most one.

    >>> split_evenly(5, 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    length, longer = divmod(num_items, num_parts)
    starts = [part * length + min(part, longer) for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def validation_mask(num_items: int, val_percent: float, seed: str) -> NDArray[np.bool_]:
    """Choose ``floor(num_items * val_percent / 100)`` items at random.

    Args:
        num_items: how many there are.
        val_percent: share to choose, 0 to 100.
        seed: text that fixes the choice.

    Returns:
        ``(num_items,)``: True where chosen.
    """
    mask = np.zeros(num_items, dtype=bool)
    choice = random.Random(seed)  # noqa: S311
    mask[choice.sample(range(num_items), int(num_items * val_percent / 100))] = True
    return mask


def assign_sequences(num_images: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Give whole sequences to partitions so that each comes near its share of the images.

    The largest sequence goes first, each to the partition that misses most of its share; every partition
    gets at least one sequence.

    Args:
        num_images: images per sequence; at least as many sequences as partitions.
        shares: wanted size of each partition, in any unit, not negative.

    Returns:
        The partition of each sequence.
    """
    total, whole = sum(num_images), sum(shares)
    missing = [total * share / whole for share in shares]
    partitions = [-1] * len(num_images)
    num_empty = len(shares)
    by_size = sorted(range(len(num_images)), key=lambda index: (-num_images[index], index))
    for rank, index in enumerate(by_size):
        candidates: Sequence[int] = range(len(shares))
        if len(by_size) - rank == num_empty:  # the rest is just enough for the empty ones
            candidates = [partition for partition in candidates if partition not in partitions]
        chosen = max(candidates, key=lambda partition: (missing[partition], -partition))
        num_empty -= chosen not in partitions
        partitions[index] = chosen
        missing[chosen] -= num_images[index]
    return partitions


def shard_file(
    sequence: str, partition: int, num_partitions: int, shard: int, num_shards: int
) -> PurePosixPath:
    """Path of a shard inside the results folder.

    >>> str(shard_file("cam0", 0, 1, 3, 32)), str(shard_file("a/cam0", 1, 2, 0, 4))
    ('cam0/cam0-shard-00003-of-00032.json', 'a/cam0/cam0-fold-001-of-002-shard-00000-of-00004.json')
    """
    folder = PurePosixPath(sequence)
    fold = f"-fold-{partition:03d}-of-{num_partitions:03d}" if num_partitions > 1 else ""
    return folder / f"{folder.name}{fold}-shard-{shard:05d}-of-{num_shards:05d}.json"


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


class ShardWriter:
    """Writes one COCO JSON file bit by bit; memory does not grow with its size.

    Args:
        path: the file, in a folder that exists.
        description: ``info.description`` of the file.
        categories: the ``categories`` list.
        first_image_id: id of the first image; the following ones count on.
        first_annotation_id: the same for annotations.

    Attributes:
        num_images: images written so far.
        num_annotations: annotations written so far.
    """

    def __init__(
        self,
        path: Path,
        description: str,
        categories: Sequence[dict[str, Any]],
        first_image_id: int,
        first_annotation_id: int,
    ) -> None:
        self.num_images = self.num_annotations = 0
        self._first_image_id = first_image_id
        self._first_annotation_id = first_annotation_id
        # The annotations come after the images in the file, but with them out of the conversion.
        self._annotations: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            _SPOOL_BYTES, dir=str(path.parent)
        )
        self._file = path.open("wb")
        head = {"info": {"description": description}, "licenses": [], "categories": list(categories)}
        self._file.write(_encoder.encode(head)[:-1] + b',"images":[')

    def add(
        self,
        file_names: Sequence[str],
        sizes_wh: NDArray[np.int32],
        boxes_xywh: NDArray[np.float64],
        category_ids: NDArray[np.int32],
        image_index: NDArray[np.int32],
    ) -> None:
        """Append images and their boxes.

        Args:
            file_names: ``n`` names as they shall stand in the file.
            sizes_wh: ``(n, 2)`` pixels.
            boxes_xywh: ``(m, 4)`` pixels.
            category_ids: ``(m,)``.
            image_index: ``(m,)``: which of the ``n`` images each box belongs to.
        """
        first_image = self._first_image_id + self.num_images
        images = [
            _Image(number, name, width, height)
            for number, (name, (width, height)) in enumerate(
                zip(file_names, sizes_wh.tolist(), strict=True), start=first_image
            )
        ]
        annotations = [
            _Annotation(number, image_id, category_id, box, area, 0)
            for number, (image_id, category_id, box, area) in enumerate(
                zip(
                    (image_index + first_image).tolist(),
                    category_ids.tolist(),
                    boxes_xywh.tolist(),
                    (boxes_xywh[:, 2] * boxes_xywh[:, 3]).tolist(),
                    strict=True,
                ),
                start=self._first_annotation_id + self.num_annotations,
            )
        ]
        _append(self._file, images, self.num_images > 0)
        _append(self._annotations, annotations, self.num_annotations > 0)
        self.num_images += len(images)
        self.num_annotations += len(annotations)

    def close(self) -> None:
        """Finish the file."""
        self._file.write(b'],"annotations":[')
        self._annotations.seek(0)
        shutil.copyfileobj(self._annotations, self._file, 2**20)
        self._file.write(b"]}")
        self.discard()

    def discard(self) -> None:
        """Let go of the file without finishing it; harmless after :meth:`close`."""
        self._annotations.close()
        self._file.close()


def _append(file: IO[bytes], rows: Sequence[msgspec.Struct], follows: bool) -> None:
    if rows:
        file.write((b"," if follows else b"") + _encoder.encode(rows)[1:-1])


# --- The order in which a conversion reads and writes: sequences, partitions, shards, chunks ---

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
                    hint="check image_dir_name and image_extension",
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
            hint="rename the folder, or list it relative to a data_root further up",
        )
        for sequence in sequences
        if sequence.name.split("/")[0] in _RESERVED_NAMES
    )
