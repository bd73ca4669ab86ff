"""Convert KITTI folders to sharded COCO JSON."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.convert.kitti import coco_categories
from ddetr_mm.convert.plan import (
    STATS_NAME,
    WARNINGS_NAME,
    ConvertOptions,
    ConvertReport,
    Plan,
    SequenceReport,
    ShardReport,
    ShardWriter,
    Step,
    shard_file,
)
from ddetr_mm.convert.problems import FoundProblem, ProblemList
from ddetr_mm.convert.reader import Chunk, ChunkContent, can_fork, ordered_map, prepare_process, read_chunk
from ddetr_mm.convert.result_folder import ResultFolder
from ddetr_mm.convert.sequences import KittiSequence, NameList, count_labels, labels_without_image
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.files import garbage_collection_paused, usable_cores

# Starting a process, forked or spawned, takes about as long as reading so many images.
_IMAGES_WORTH_A_FORK = 3_000
_IMAGES_WORTH_A_PROCESS = 20_000
_SHOWN_WHEN_STRICT = 20
_SHARD_NAME = re.compile(r".+-shard-\d{5}-of-\d{5}\.json")

Progress = Callable[[int, int], None]
Status = Callable[[str], None]


def convert_kitti(
    options: ConvertOptions, *, progress: Progress | None = None, status: Status | None = None
) -> ConvertReport:
    """Convert KITTI folders to COCO JSON shards.

    The results folder gets ``<sequence>/<sequence>[-fold-PPP-of-NNN]-shard-SSSSS-of-NNNNN.json``, each
    a COCO file of its own, ``stats.txt`` (JSON with counts and offsets) and ``warnings.json`` (every bad
    input with file and line). What a former conversion left there is replaced as a whole when everything
    else is done; other files stay.

    Args:
        options: what to convert.
        progress: called with ``(images done, images in all)``, at least every few hundred images.
        status: called with a sentence at each step.

    Raises:
        DataError: a list, folder or mapping is missing or wrong; no image was found; the results folder
            cannot be written; with ``options.strict``, any bad input.
    """
    started = time.monotonic()
    say = status or (lambda message: None)
    options.check()
    plan = Plan(options)
    say("Generating partitions")
    with _disk_errors_told(options), ResultFolder(options.results_dir) as folder:
        folder.check_free(_planned_files(plan) + _foreign_shards(plan, folder))
        writing = _Writing(plan, folder, progress or (lambda done, total: None), say)
        try:
            writing.run()
        finally:
            writing.discard()
        _write_stats(folder.staged(STATS_NAME), plan, writing)
        folder.commit([*writing.files, WARNINGS_NAME, STATS_NAME])
    say("Json generation complete.")
    names = {number: name for name, number in plan.category_ids.items()}
    return ConvertReport(
        results_dir=options.results_dir,
        num_images=writing.num_images,
        num_annotations=writing.num_annotations,
        category_ids=plan.category_ids,
        boxes_per_category={
            names[number]: count for number, count in sorted(writing.boxes_per_category.items())
        },
        sequences=writing.sequences,
        problem_counts=dict(writing.problems.counts),
        unknown_classes=dict(writing.problems.unknown_classes),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _disk_errors_told(options: ConvertOptions) -> Iterator[None]:
    """A full disk or a folder that vanishes is told like other wrong input."""
    try:
        yield
    except OSError as error:
        raise DataError(
            Problem(
                f"the conversion stopped: {error.strerror or error}",
                file=error.filename or options.results_dir,
                hint="mend this and start again",
            )
        ) from error


class _Writing:
    """Writes the shards of a plan.

    Attributes:
        files: shards written, relative to the folder.
        sequences: reports of what was written.
        problems: the list of bad input.
        num_images, num_annotations: written so far.
        boxes_per_category: category id → number of boxes.
    """

    def __init__(self, plan: Plan, folder: ResultFolder, progress: Progress, status: Status) -> None:
        self.plan = plan
        self.folder = folder
        self.files: list[str] = []
        self.sequences: list[SequenceReport] = []
        self.problems = ProblemList(folder.staged(WARNINGS_NAME))
        self.num_images = self.num_annotations = 0
        self.boxes_per_category: Counter[int] = Counter()
        self._progress = progress
        self._status = status
        self._done = 0
        self._missing_labels = 0
        self._shard: ShardWriter | None = None
        self._categories = coco_categories(plan.category_ids)

    def run(self) -> None:
        """Read and write everything."""
        on_the_way: deque[Step] = deque()

        def chunks() -> Iterator[Chunk]:
            for step in self.plan.steps():
                on_the_way.append(step)
                yield self.plan.chunk(step)

        self._progress(0, self.plan.total)
        reading = ordered_map(
            read_chunk, chunks(), self._num_processes(), prepare_process, (self.plan.rules,)
        )
        with closing(reading) as contents:
            for content in contents:
                with garbage_collection_paused():
                    self._write(on_the_way.popleft(), content)
        self.problems.close()

    def discard(self) -> None:
        """Let go of open files; harmless when all are finished."""
        self.problems.discard()
        if self._shard is not None:
            self._shard.discard()

    def _num_processes(self) -> int:
        wanted = self.plan.options.num_workers
        if wanted is not None:
            return wanted
        worth = _IMAGES_WORTH_A_FORK if can_fork() else _IMAGES_WORTH_A_PROCESS
        # Writing takes this process a quarter of the time that reading takes another, so it needs no core to
        # itself; on a single core there is nothing to share.
        cores = usable_cores()
        return min(cores, self.plan.total // worth) if cores > 1 else 0

    def _write(self, step: Step, content: ChunkContent) -> None:
        sequence = self.plan.sequences[step.sequence]
        self._report([*step.problems, *content.problems])
        if len(self.sequences) == step.sequence:
            self._begin_sequence(sequence)
        if self._shard is None:
            self._shard = self._begin_shard(sequence, step)
        self._shard.add(
            [sequence.image_prefix + step.names[position] for position in content.kept],
            content.sizes_wh,
            content.boxes_xywh,
            content.category_ids,
            content.image_index,
        )
        for number, count in enumerate(np.bincount(content.category_ids).tolist()):
            if count:
                self.boxes_per_category[number] += count
        if step.ends_shard:
            self._end_shard(self._shard, step)
            self._shard = None
        if not step.repeats:
            self._missing_labels += content.num_missing_labels
            self._done += len(step.names)
            self._progress(self._done, self.plan.total)
        if step.ends_sequence is not None:
            self._end_sequence(sequence, step.ends_sequence)

    def _begin_sequence(self, sequence: KittiSequence) -> None:
        self._missing_labels = 0
        self.sequences.append(
            SequenceReport(
                name=sequence.name,
                image_root=sequence.image_root,
                num_images=0,
                num_annotations=0,
                first_image_id=self.num_images,
                first_annotation_id=self.num_annotations,
            )
        )

    def _begin_shard(self, sequence: KittiSequence, step: Step) -> ShardWriter:
        self._status(f"Writing partition {step.partition}, shard {step.shard}")
        return ShardWriter(
            self.folder.staged(self._file_of(step)),
            f"KITTI sequence {sequence.name}",
            self._categories,
            self.num_images,
            self.num_annotations,
        )

    def _file_of(self, step: Step) -> str:
        options = self.plan.options
        name = self.plan.sequences[step.sequence].name
        return str(shard_file(name, step.partition, options.num_partitions, step.shard, options.num_shards))

    def _end_shard(self, shard: ShardWriter, step: Step) -> None:
        shard.close()
        report = self.sequences[step.sequence]
        report.shards.append(
            ShardReport(
                file=self._file_of(step),
                partition=step.partition,
                num_images=shard.num_images,
                num_annotations=shard.num_annotations,
                first_image_id=self.num_images,
                first_annotation_id=self.num_annotations,
            )
        )
        self.files.append(self._file_of(step))
        self.num_images += shard.num_images
        self.num_annotations += shard.num_annotations
        report.num_images += shard.num_images
        report.num_annotations += shard.num_annotations

    def _end_sequence(self, sequence: KittiSequence, images: NameList) -> None:
        """Report the labels that no image belongs to; looks for them only when the numbers show some."""
        if count_labels(sequence) > len(images) - self._missing_labels:
            extension = self.plan.options.image_extension
            self._report(
                [
                    FoundProblem(
                        "label_without_image", sequence.label_prefix + _printable(name), 0, "no image"
                    )
                    for name in labels_without_image(sequence, images, extension)
                ]
            )

    def _report(self, problems: Sequence[FoundProblem]) -> None:
        self.problems.extend(problems)
        if problems and self.plan.options.strict:
            shown = [
                Problem(
                    problem.kind.replace("_", " "),
                    file=problem.file,
                    where=f"line {problem.line}" if problem.line else None,
                    value=problem.detail,
                )
                for problem in problems[:_SHOWN_WHEN_STRICT]
            ]
            hint = "mend the input, or set strict to false to go on and get the whole list in warnings.json"
            raise DataError(
                *shown, Problem("strict is set, so the first bad input ends the conversion", hint=hint)
            )


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _planned_files(plan: Plan) -> list[str]:
    options = plan.options
    shards = [
        str(shard_file(sequence.name, partition, options.num_partitions, shard, options.num_shards))
        for sequence, partitions in zip(plan.sequences, plan.partitions, strict=True)
        for partition in partitions
        for shard in range(options.num_shards)
    ]
    return [*shards, WARNINGS_NAME, STATS_NAME]


def _foreign_shards(plan: Plan, folder: ResultFolder) -> list[str]:
    """Shards in the folders of the sequences: a glob would mix those of others with ours."""
    found = []
    for sequence in plan.sequences:
        place = folder.path / sequence.name
        if place.is_dir():
            found += [
                f"{sequence.name}/{name}" for name in sorted(os.listdir(place)) if _SHARD_NAME.fullmatch(name)
            ]
    return found


def _write_stats(path: Path, plan: Plan, writing: _Writing) -> None:
    options = plan.options
    boxes = writing.boxes_per_category
    sequences: list[dict[str, Any]] = []
    for sequence in writing.sequences:
        sequences.append(asdict(sequence))
        del sequences[-1]["image_root"]  # the same data give the same file wherever they lie
    stats = {
        "num_images": writing.num_images,
        "num_annotations": writing.num_annotations,
        "next_image_id": writing.num_images,
        "next_annotation_id": writing.num_annotations,
        "num_partitions": options.num_partitions,
        "partition_mode": options.partition_mode,
        "num_shards": options.num_shards,
        "categories": [
            {**category, "num_annotations": boxes[category["id"]]}
            for category in coco_categories(plan.category_ids)
        ],
        "problems": dict(sorted(writing.problems.counts.items())),
        "sequences": sequences,
    }
    path.write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
