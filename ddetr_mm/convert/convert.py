"""Convert KITTI folders to sharded COCO JSON: options, report, and the order of the steps.

The images of every sequence are listed (:mod:`~ddetr_mm.convert.sequences`) and cut into partitions, shards
and pieces (:mod:`~ddetr_mm.convert.plan`); the pieces are read on several processes
(:mod:`~ddetr_mm.convert.reader`), the shards written in order, and all files put in place at once
(:mod:`~ddetr_mm.convert.result_folder`).
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ddetr_mm.convert.kitti import (
    DEFAULT_CLASS_MAPPING,
    LEFT_OUT,
    category_ids,
    check_class_mapping,
    coco_categories,
    load_class_mapping,
)
from ddetr_mm.convert.plan import Piece, ShardWriter, assign_sequences, grouped, partition_pieces, shard_file
from ddetr_mm.convert.problems import LINE_DROPPED, PROBLEM_KINDS, FoundProblem, ProblemList, most_frequent
from ddetr_mm.convert.reader import (
    PieceContent,
    ReadingRules,
    can_fork,
    ordered_map,
    prepare_process,
    read_pieces,
)
from ddetr_mm.convert.result_folder import ResultFolder
from ddetr_mm.convert.sequences import (
    KittiSequence,
    count_labels,
    image_names,
    labels_without_image,
    read_sequences,
)
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import garbage_collection_paused, usable_cores

STATS_NAME = "stats.txt"
WARNINGS_NAME = "warnings.json"
DATASET_NAME = "dataset.yaml"
_RESERVED_NAMES = (STATS_NAME, WARNINGS_NAME, DATASET_NAME, "status.json")

# Starting a process, forked or spawned, takes about as long as reading so many images.
_IMAGES_WORTH_A_FORK = 3_000
_IMAGES_WORTH_A_PROCESS = 20_000
_SHOWN_WHEN_STRICT = 20
_SHOWN_FILES = 3
_SHOWN_CLASSES = 30
_SHARD_NAME = re.compile(r".+-shard-\d{5}-of-\d{5}\.json")

Progress = Callable[[int, int], None]
Status = Callable[[str], None]

# --- Options and report ---


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion. The spec checks their values (bounds in its schema, ``spec/rules.py``).

    Attributes:
        input_source: text file with one sequence folder a line.
        results_dir: folder of the shards, ``stats.txt``, ``warnings.json`` and ``dataset.yaml``.
        data_root: folder that the lines of ``input_source`` are relative to; None: the current folder.
        image_dir_name: folder of the images inside each sequence; None: the sequence folder itself.
        label_dir_name: the same for labels.
        num_shards: JSON files of each sequence and partition, at least 1.
        num_partitions: 1 without a mode, 2 with ``random``, up to the number of sequences with ``sequence``.
        partition_mode: None: all in one; ``"random"``: each sequence is split into fold 0 (validation) and
            fold 1; ``"sequence"``: every sequence goes as a whole into one partition.
        val_split: percent of the images that go to fold 0, from 0 to 100. With ``"sequence"`` it acts only
            for two partitions and above 0; otherwise partitions are equally large.
        image_extension: the only extension of an image, e.g. ``".jpg"``; None: every common one.
        mapping: label class → category; None leaves a class out on purpose.
        mapping_path: JSON file with the same; without either, TAO's default.
        strict: stop at the first bad input.
        allow_empty: accept label files of which no line can be used, and a conversion without any box.
        pad_shards: fill shorter shards with repeated images (chosen by ``seed``) until all shards of a
            partition list equally many.
        num_workers: processes besides the calling one; None: chosen by the number of images and cores.
        seed: fixes random partitions and repeats.
        decode_images: decode every image, which finds damage that headers do not show, and is far slower.
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
    mapping: Mapping[str, str | None] | None = None
    mapping_path: Path | None = None
    strict: bool = False
    allow_empty: bool = False
    pad_shards: bool = False
    num_workers: int | None = None
    seed: int = 0
    decode_images: bool = False


@dataclass(frozen=True)
class ShardReport:
    """One shard; ``file`` is relative to the results folder."""

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
        image_root: folder that the ``file_name`` of its images is relative to.
        num_images: images written (repeats included).
        num_annotations: boxes written.
        first_image_id: first id of its images.
        first_annotation_id: first id of its boxes.
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
    """Result of a conversion.

    Attributes:
        results_dir: folder of the files.
        num_images: images written (repeats included).
        num_annotations: boxes written.
        category_ids: category → id.
        boxes_per_category: category → number of boxes.
        sequences: in the order of ``input_source``.
        problem_counts: kind of problem → number of cases.
        unknown_classes: class without a mapping → number of dropped lines.
        dataset_section: the ``dataset:`` section of a spec that trains on the result, as YAML.
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
    dataset_section: str
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
    def dataset_path(self) -> Path:
        """The file with the ``dataset:`` section."""
        return self.results_dir / DATASET_NAME

    @property
    def images_per_second(self) -> float:
        """Speed of the whole conversion."""
        return self.num_images / self.seconds if self.seconds else math.inf

    def warning_lines(self) -> list[str]:
        """One line for each kind of problem, the most frequent first."""
        return [
            f"{number:,} x {PROBLEM_KINDS[kind]} ({kind})"
            for kind, number in most_frequent(self.problem_counts)
        ]


# --- Conversion ---


def convert_kitti(
    options: ConvertOptions, *, progress: Progress | None = None, status: Status | None = None
) -> ConvertReport:
    """Convert KITTI folders to COCO JSON shards.

    The results folder gets ``<sequence>/<sequence>[-fold-PPP-of-NNN]-shard-SSSSS-of-NNNNN.json``, each a COCO
    file of its own, ``stats.txt`` (JSON with counts and offsets), ``warnings.json`` (every bad input with
    file and line) and ``dataset.yaml`` (the section of a spec that names the shards). The files of an earlier
    conversion are replaced all at once, at the end; other files stay.

    Args:
        options: what to convert.
        progress: called with ``(images done, images in all)``, at least every few hundred images.
        status: called with a sentence at each step.

    Raises:
        DataError: a list, folder or mapping is missing or wrong; there is no image; the results folder cannot
            be written to; no box was found or a label file has no usable line, unless
            ``options.allow_empty``; with ``options.strict``, any bad input.
    """
    started = time.monotonic()
    say = status or (lambda message: None)
    conversion = _Conversion(options, progress or (lambda done, total: None), say)
    say("Generating partitions")
    with _disk_errors_named(options), ResultFolder(options.results_dir) as folder:
        folder.check_free(conversion.planned_files() + conversion.foreign_shards(folder.path))
        conversion.write(folder)
        if not options.allow_empty:
            conversion.check_losses()
        dataset_section = conversion.dataset_section()
        folder.staged(DATASET_NAME).write_text(dataset_section, encoding="utf-8")
        folder.staged(STATS_NAME).write_text(conversion.stats(), encoding="utf-8")
        folder.commit([*conversion.files, WARNINGS_NAME, DATASET_NAME, STATS_NAME])
    say("Json generation complete.")
    names = {number: name for name, number in conversion.category_ids.items()}
    boxes = sorted(conversion.boxes_per_category.items())
    return ConvertReport(
        results_dir=options.results_dir,
        num_images=conversion.num_images,
        num_annotations=conversion.num_annotations,
        category_ids=conversion.category_ids,
        boxes_per_category={names[number]: count for number, count in boxes},
        sequences=conversion.sequence_reports,
        problem_counts=dict(conversion.problem_counts),
        unknown_classes=dict(conversion.unknown_classes),
        dataset_section=dataset_section,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _disk_errors_named(options: ConvertOptions) -> Iterator[None]:
    """Report a full disk, or a folder that vanishes, like other wrong input."""
    try:
        yield
    except OSError as error:
        what = f"the conversion stopped: {error.strerror or error}"
        file = error.filename or options.results_dir
        raise DataError(Problem(what, file=file, hint="correct this and start again")) from error


class _Conversion:
    """One conversion.

    Attributes:
        category_ids: category → id.
        files: shards written, relative to the results folder.
        sequence_reports: in the order of ``input_source``.
        num_images, num_annotations: written so far.
        boxes_per_category: category id → number of boxes.
        problem_counts, unknown_classes: see :class:`~ddetr_mm.convert.problems.ProblemList`.
    """

    def __init__(self, options: ConvertOptions, progress: Progress, status: Status) -> None:
        self.options = options
        self._progress, self._status = progress, status
        mapping = _class_mapping(options)
        self.category_ids = category_ids(category for category in mapping.values() if category is not None)
        self._rules = ReadingRules(
            category_of_class={
                name: LEFT_OUT if category is None else self.category_ids[category]
                for name, category in mapping.items()
            },
            image_extension=options.image_extension,
            decode_images=options.decode_images,
        )
        self._sequences = read_sequences(
            options.input_source, options.data_root, options.image_dir_name, options.label_dir_name
        )
        _check_names(self._sequences, options.input_source)
        self._listed = [image_names(sequence, options.image_extension) for sequence in self._sequences]
        self._total = sum(len(names) for names, _ in self._listed)
        if self._total == 0:
            ending = options.image_extension or "any common image extension"
            what = f"none of the listed sequences has an image with {ending}"
            hint = "check image_dir_name and image_extension"
            raise DataError(Problem(what, file=options.input_source, hint=hint))
        self._partitions = self._partitions_of_sequences()
        self.files: list[str] = []
        self.sequence_reports: list[SequenceReport] = []
        self.num_images = self.num_annotations = 0
        self.boxes_per_category: Counter[int] = Counter()
        self.problem_counts: Counter[str] = Counter()
        self.unknown_classes: Counter[str] = Counter()
        self._lost_files: list[str] = []  # the first ones
        self._done = self._missing_labels = 0

    def planned_files(self) -> list[str]:
        """All files that the conversion will write."""
        shards = [
            self._shard_file(sequence, partition, shard)
            for sequence, partitions in zip(self._sequences, self._partitions, strict=True)
            for partition in partitions
            for shard in range(self.options.num_shards)
        ]
        return [*shards, WARNINGS_NAME, DATASET_NAME, STATS_NAME]

    def foreign_shards(self, results_dir: Path) -> list[str]:
        """Shards in the folders of the sequences: a glob would mix those of others with ours."""
        return [
            f"{sequence.name}/{name}"
            for sequence in self._sequences
            if (results_dir / sequence.name).is_dir()
            for name in sorted(os.listdir(results_dir / sequence.name))
            if _SHARD_NAME.fullmatch(name)
        ]

    def write(self, folder: ResultFolder) -> None:
        """Read all pieces and write all shards and ``warnings.json``, into the folder's staged files."""
        problems = ProblemList(folder.staged(WARNINGS_NAME))
        self.problem_counts, self.unknown_classes = problems.counts, problems.unknown_classes
        writer: ShardWriter | None = None
        current: KittiSequence | None = None
        categories = coco_categories(self.category_ids)
        self._progress(0, self._total)
        reading = ordered_map(
            read_pieces, grouped(self._pieces()), self._num_processes(), prepare_process, (self._rules,)
        )
        try:
            with closing(reading):
                for piece, content in (pair for group in reading for pair in zip(*group, strict=True)):
                    if piece.sequence is not current:
                        self._end_sequence(problems)
                        current = piece.sequence
                        self._begin_sequence(current, problems)
                    self._report(problems, content.problems)
                    if writer is None:
                        self._status(f"Writing partition {piece.partition}, shard {piece.shard}")
                        path = folder.staged(self._shard_file(current, piece.partition, piece.shard))
                        info = f"KITTI sequence {current.name}"
                        writer = ShardWriter(path, info, categories, self.num_images, self.num_annotations)
                    with garbage_collection_paused():
                        self._write_piece(writer, piece, content)
                    if piece.ends_shard:
                        writer.close()
                        self._end_shard(writer, piece)
                        writer = None
            self._end_sequence(problems)
            problems.close()
        finally:
            problems.discard()
            if writer is not None:
                writer.discard()

    def stats(self) -> str:
        """The content of ``stats.txt``; the same data give the same text wherever they are."""
        sequences: list[dict[str, Any]] = [asdict(report) for report in self.sequence_reports]
        for sequence in sequences:
            del sequence["image_root"]
        stats = {
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "next_image_id": self.num_images,
            "next_annotation_id": self.num_annotations,
            "num_partitions": self.options.num_partitions,
            "partition_mode": self.options.partition_mode,
            "num_shards": self.options.num_shards,
            "categories": [
                {**category, "num_annotations": self.boxes_per_category[category["id"]]}
                for category in coco_categories(self.category_ids)
            ],
            "problems": dict(sorted(self.problem_counts.items())),
            "sequences": sequences,
        }
        return json.dumps(stats, indent=1) + "\n"

    def check_losses(self) -> None:
        """Refuse a result without boxes, and label files that lost every line.

        Raises:
            DataError: with the reasons, the unknown classes, and entries for the class mapping.
        """
        counts = self.problem_counts
        num_lost = counts["all_lines_dropped"]
        problems = []
        if num_lost:
            shown = ", ".join(self._lost_files) + (", ..." if num_lost > len(self._lost_files) else "")
            what = f"{num_lost:,} label files have no usable line"
            problems.append(Problem(what, file=self.options.input_source, value=shown))
        if not self.num_annotations:
            what = f"no box was found in {self.num_images:,} images"
            problems.append(Problem(what, file=self.options.input_source))
        if not problems:
            return
        if self.unknown_classes:
            shown = ", ".join(f"{name} ({count:,})" for name, count in self._most_unknown())
            problems.append(
                Problem(
                    f"{counts['unknown_class']:,} lines have a class that the mapping lacks",
                    file=self.options.mapping_path,
                    where="mapping_path",
                    value=shown,
                    hint=f"add to the mapping, with null for a class to leave out: {self.mapping_to_paste()}",
                )
            )
        for kind, number in sorted(counts.items()):
            if kind in LINE_DROPPED and kind != "unknown_class":
                problems.append(Problem(f"{number:,} x {PROBLEM_KINDS[kind]}"))
        hint = (
            "nothing was written; correct the input, or set ddetr_mm.allow_empty to true to accept the loss"
        )
        raise DataError(*problems, Problem("the conversion would lose whole label files", hint=hint))

    def _most_unknown(self) -> list[tuple[str, int]]:
        return most_frequent(self.unknown_classes)[:_SHOWN_CLASSES]

    def mapping_to_paste(self) -> str:
        """The unknown classes as entries of a mapping file, each its own category."""
        return json.dumps({name: name for name, _ in self._most_unknown()}, ensure_ascii=False)

    def dataset_section(self) -> str:
        """The ``dataset:`` section of a spec: sources by partition, number of classes; YAML."""
        options = self.options
        sources: dict[str, list[dict[str, str]]] = {"train_data_sources": [], "val_data_sources": []}
        for report in self.sequence_reports:
            for partition in sorted({shard.partition for shard in report.shards if shard.num_images}):
                is_validation = options.num_partitions > 1 and partition == 0
                pattern = self._shard_file_pattern(report.name, partition)
                sources["val_data_sources" if is_validation else "train_data_sources"].append(
                    {
                        "image_dir": os.path.abspath(report.image_root),
                        "json_file": pattern,
                    }
                )
        num_classes = max(self.category_ids.values()) + 1
        names = ", ".join(
            f"{number} {name if name.isprintable() else json.dumps(name)}"  # a comment is one line
            for name, number in self.category_ids.items()
        )
        content = {"dataset": {**{k: v for k, v in sources.items() if v}, "num_classes": num_classes}}
        head = f"# Classes: {_printable(names)}. num_classes counts the background too.\n"
        if not sources["val_data_sources"]:
            head += "# No validation data: set partition_mode, num_partitions and val_split, or name other.\n"
        return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1_000)

    def _shard_file_pattern(self, sequence: str, partition: int) -> str:
        """A glob for the shards of a sequence and partition."""
        first = shard_file(sequence, partition, self.options.num_partitions, 0, self.options.num_shards)
        stem, _, _ = os.path.abspath(self.options.results_dir / first).rpartition("-shard-")
        return f"{glob.escape(stem)}-shard-*.json"

    def _partitions_of_sequences(self) -> list[list[int]]:
        """The partitions that each sequence has shards in."""
        options = self.options
        if options.partition_mode != "sequence":
            return [list(range(options.num_partitions))] * len(self._sequences)
        if options.num_partitions > len(self._sequences):
            raise DataError(
                Problem(
                    "more partitions than sequences",
                    where="num_partitions",
                    value=options.num_partitions,
                    allowed=f"at most {len(self._sequences)} with partition_mode sequence",
                )
            )
        shares = [1.0] * options.num_partitions
        if options.num_partitions == 2 and options.val_split > 0:
            shares = [options.val_split, 100 - options.val_split]
        return [[one] for one in assign_sequences([len(names) for names, _ in self._listed], shares)]

    def _pieces(self) -> Iterator[Piece]:
        options = self.options
        for sequence, (names, _), partitions in zip(
            self._sequences, self._listed, self._partitions, strict=True
        ):
            for partition in partitions:
                yield from partition_pieces(
                    sequence,
                    names,
                    partition,
                    num_shards=options.num_shards,
                    val_percent=options.val_split if options.partition_mode == "random" else None,
                    pad_shards=options.pad_shards,
                    seed=options.seed,
                )

    def _num_processes(self) -> int:
        if self.options.num_workers is not None:
            return self.options.num_workers
        worth = _IMAGES_WORTH_A_FORK if can_fork() else _IMAGES_WORTH_A_PROCESS
        # Writing takes this process a quarter of the time that reading takes another: no core of its own.
        cores = usable_cores()
        return min(cores, self._total // worth) if cores > 1 else 0

    def _begin_sequence(self, sequence: KittiSequence, problems: ProblemList) -> None:
        names, duplicates = self._listed[len(self.sequence_reports)]
        self._missing_labels = 0
        self.sequence_reports.append(
            SequenceReport(
                name=sequence.name,
                image_root=sequence.image_root,
                num_images=0,
                num_annotations=0,
                first_image_id=self.num_images,
                first_annotation_id=self.num_annotations,
            )
        )
        found = [
            FoundProblem("duplicate_name", sequence.image_prefix + name, 0, "same name as an earlier image")
            for name in duplicates
        ]
        if not names:
            found.append(FoundProblem("no_images", sequence.image_prefix, 0, "no image"))
        self._report(problems, found)

    def _write_piece(self, writer: ShardWriter, piece: Piece, content: PieceContent) -> None:
        writer.add(
            [piece.sequence.image_prefix + piece.names[position] for position in content.kept],
            content.sizes_wh,
            content.boxes_xywh,
            content.category_ids,
            content.image_index,
        )
        for number, count in enumerate(np.bincount(content.category_ids).tolist()):
            if count:
                self.boxes_per_category[number] += count
        if not piece.is_repeat:
            self._missing_labels += content.num_missing_labels
            self._done += len(piece.names)
            self._progress(self._done, self._total)

    def _end_shard(self, writer: ShardWriter, piece: Piece) -> None:
        report = self.sequence_reports[-1]
        shard = ShardReport(
            file=self._shard_file(piece.sequence, piece.partition, piece.shard),
            partition=piece.partition,
            num_images=writer.num_images,
            num_annotations=writer.num_annotations,
            first_image_id=self.num_images,
            first_annotation_id=self.num_annotations,
        )
        report.shards.append(shard)
        self.files.append(shard.file)
        self.num_images += shard.num_images
        self.num_annotations += shard.num_annotations
        report.num_images += shard.num_images
        report.num_annotations += shard.num_annotations

    def _end_sequence(self, problems: ProblemList) -> None:
        """Report labels without an image; they are looked for only where the numbers differ."""
        if not self.sequence_reports:
            return
        index = len(self.sequence_reports) - 1
        sequence, (images, _) = self._sequences[index], self._listed[index]
        if count_labels(sequence) > len(images) - self._missing_labels:
            names = labels_without_image(sequence, images, self.options.image_extension)
            self._report(
                problems,
                [
                    FoundProblem(
                        "label_without_image", sequence.label_prefix + _printable(name), 0, "no image"
                    )
                    for name in names
                ],
            )

    def _report(self, problems: ProblemList, found: Sequence[FoundProblem]) -> None:
        problems.extend(found)
        for problem in found:
            if problem.kind == "all_lines_dropped" and len(self._lost_files) < _SHOWN_FILES:
                self._lost_files.append(problem.file)
        if found and self.options.strict:
            shown = [
                Problem(
                    problem.kind.replace("_", " "),
                    file=problem.file,
                    where=f"line {problem.line}" if problem.line else None,
                    value=problem.detail,
                )
                for problem in found[:_SHOWN_WHEN_STRICT]
            ]
            hint = "correct the input, or set strict to false and get the whole list in warnings.json"
            what = "strict is set, so the first bad input ends the conversion"
            raise DataError(*shown, Problem(what, hint=hint))

    def _shard_file(self, sequence: KittiSequence, partition: int, shard: int) -> str:
        options = self.options
        return shard_file(sequence.name, partition, options.num_partitions, shard, options.num_shards)


def _class_mapping(options: ConvertOptions) -> Mapping[str, str | None]:
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


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
