"""What a conversion is asked for, and what it reports back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ddetr_mm.data.conversion_problems import PROBLEM_KINDS
from ddetr_mm.errors import DataError, Problem

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
            mend = "set partition_mode to random or sequence to get several partitions"
            return [
                Problem(
                    "needs a partition_mode", where="num_partitions", value=number, allowed="1", mend=mend
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
