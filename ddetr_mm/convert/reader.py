"""Reading images and labels: a few hundred images at a time, on several processes, in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddetr_mm.convert.kitti import (
    BOX_VERDICTS,
    FIRST_DROPPED_VERDICT,
    ClassLookup,
    LabelProblem,
    clip_boxes,
    parse_labels,
)
from ddetr_mm.convert.plan import Piece
from ddetr_mm.convert.problems import LINE_DROPPED, FoundProblem
from ddetr_mm.convert.sequences import LABEL_EXTENSION, image_stem
from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size
from ddetr_mm.files import garbage_collection_paused

logger = logging.getLogger(__name__)

# --- Processes ---

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_PER_PROCESS = 4  # one that it works on, the others wait for it


def can_fork() -> bool:
    """Whether processes may be forked, which start at once; spawned ones import for half a second first.

    Not beside other threads: one may hold a lock that stays locked in the copy.
    """
    return "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...] = (),
) -> Generator[tuple[Task, Result], None, None]:
    """Yield ``(task, function(task))`` for each task, in order.

    Only a few tasks are in work at a time, so ``tasks`` may be a generator of any length. Processes are
    forked where :func:`can_fork` allows it, else spawned. They ignore Ctrl-C and end when this process dies;
    where one of them dies, this process does the remaining tasks itself.

    Args:
        function: a module-level function; its errors are raised here.
        tasks: its arguments; must be picklable, like the results.
        num_processes: processes besides this one; 0 to do everything here.
        initializer: called once in every process, this one included, before the first task.
        initargs: its arguments.
    """
    initializer(*initargs)
    tasks = iter(tasks)
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    if num_processes > 0:
        pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("fork" if can_fork() else "spawn"),
            initializer=_start_process,
            initargs=(initializer, initargs),
        )
        unsent: list[Task] = []
        try:
            for task in tasks:
                unsent = [task]
                with _interrupts_blocked():
                    waiting.append((task, pool.submit(function, task)))
                unsent = []
                if len(waiting) >= num_processes * _TASKS_PER_PROCESS:
                    yield waiting[0][0], waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][0], waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool:
            logger.warning("a worker process ended unexpectedly; continuing in one process")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for task, _ in waiting:
            yield task, function(task)
        for task in unsent:
            yield task, function(task)
    for task in tasks:
        yield task, function(task)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A block whose new processes inherit a blocked SIGINT: Ctrl-C never reaches them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# --- Reading one piece ---

_READ_BYTES = 2**16


@dataclass(frozen=True)
class ReadingRules:
    """The part of the options that reading needs.

    Attributes:
        category_of_class: label class → category id, or ``kitti.LEFT_OUT``.
        image_extension: extension that image names have; None: from the last dot on.
        decode_images: decode every image instead of reading its header only.
    """

    category_of_class: Mapping[str, int]
    image_extension: str | None = None
    decode_images: bool = False


@dataclass
class PieceContent:
    """Images and boxes of a piece. n images, m boxes.

    Attributes:
        kept: (n,) positions in ``Piece.names`` of the images that can be used.
        sizes_wh: (n, 2) int32 pixels.
        boxes_xywh: (m, 4) float64 pixels, clipped to the image.
        category_ids: (m,) int32.
        image_index: (m,) int32, ascending: position in ``kept``.
        num_missing_labels: images without a label file.
        problems: in the order of files and lines.
    """

    kept: list[int]
    sizes_wh: NDArray[np.int32]
    boxes_xywh: NDArray[np.float64]
    category_ids: NDArray[np.int32]
    image_index: NDArray[np.int32]
    num_missing_labels: int
    problems: list[FoundProblem]


class PieceReader:
    """Reads pieces; class names that it has looked up are kept between them."""

    def __init__(self, rules: ReadingRules) -> None:
        self.rules = rules
        self._lookup = ClassLookup(rules.category_of_class)

    def read(self, pieces: Sequence[Piece]) -> list[PieceContent]:
        """Sizes and boxes of pieces of one sequence. Bad input is reported in the results, never raised."""
        names = [name for piece in pieces for name in piece.names]
        content, found, missing = self._read(replace(pieces[0], names=names))
        contents, start = [], 0
        for piece in pieces:
            positions = range(start, start + len(piece.names))
            contents.append(_part(content, found, missing, positions, piece.is_repeat))
            start = positions.stop
        return contents

    def _read(self, piece: Piece) -> tuple[PieceContent, list[tuple[int, FoundProblem]], list[int]]:
        """A piece's content, its problems with the images' positions, and positions without a label."""
        found: list[tuple[int, FoundProblem]] = []
        kept, texts, sizes, missing = self._read_files(piece, found)
        columns, label_problems = parse_labels(texts, self._lookup)
        sizes_wh = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        clipped, verdicts = clip_boxes(columns.boxes_xyxy, sizes_wh[columns.file_index])
        for problem in label_problems:
            position = kept[problem.file_index]
            file = self._label_file(piece, position)
            found.append((position, FoundProblem(problem.kind, file, problem.line, problem.detail)))
        for row in np.flatnonzero(verdicts):
            position = kept[columns.file_index[row]]
            box = " ".join(f"{value:.10g}" for value in columns.boxes_xyxy[row])
            width, height = sizes_wh[columns.file_index[row]]
            detail = f"{box} in {width}x{height}"
            line = int(columns.line_numbers[row])
            file = self._label_file(piece, position)
            found.append((position, FoundProblem(BOX_VERDICTS[verdicts[row]], file, line, detail)))
        boxes_xywh, good = clipped, verdicts < FIRST_DROPPED_VERDICT
        for file_index in _files_without_usable_line(label_problems, columns.file_index):
            position = kept[file_index]
            file = self._label_file(piece, position)
            found.append((position, FoundProblem("all_lines_dropped", file, 0, "no usable line")))
        found.sort(key=lambda item: (item[0], item[1].line))
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        content = PieceContent(
            kept=kept,
            sizes_wh=sizes_wh,
            boxes_xywh=boxes_xywh[good],
            category_ids=columns.category_ids[good],
            image_index=columns.file_index[good],
            num_missing_labels=len(missing),
            problems=[],
        )
        return content, found, missing

    def _read_files(
        self, piece: Piece, found: list[tuple[int, FoundProblem]]
    ) -> tuple[list[int], list[bytes], list[tuple[int, int]], list[int]]:
        """Positions, label texts and sizes of the images that can be used; positions without a label."""
        kept: list[int] = []
        texts: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        missing: list[int] = []
        sequence = piece.sequence
        image_dir, label_dir = str(sequence.image_dir), str(sequence.label_dir)
        for position, name in enumerate(piece.names):
            image_file = sequence.image_prefix + name
            if not (name.isascii() or _is_utf8(name)):
                shown = image_file.encode("utf-8", "backslashreplace").decode()
                found.append((position, FoundProblem("name_not_utf8", shown, 0, "file name")))
                continue
            label = image_stem(name, self.rules.image_extension) + LABEL_EXTENSION
            label_file = sequence.label_prefix + label
            try:
                text = _read_file(f"{label_dir}/{label}")
                size = read_image_size(f"{image_dir}/{name}", decode=self.rules.decode_images)
            except FileNotFoundError:
                missing.append(position)
                found.append((position, FoundProblem("missing_label", image_file, 0, label_file)))
            except OSError as error:
                reason = error.strerror or str(error)
                found.append((position, FoundProblem("unreadable_label", label_file, 0, reason)))
            except UnreadableImage as error:
                kind = "truncated_image" if error.truncated else "undecodable_image"
                found.append((position, FoundProblem(kind, image_file, 0, error.reason)))
            else:
                kept.append(position)
                texts.append(text)
                sizes.append(size)
        return kept, texts, sizes, missing

    def _label_file(self, piece: Piece, position: int) -> str:
        stem = image_stem(piece.names[position], self.rules.image_extension)
        return f"{piece.sequence.label_prefix}{stem}{LABEL_EXTENSION}"


def _part(
    content: PieceContent,
    found: Sequence[tuple[int, FoundProblem]],
    missing: Sequence[int],
    positions: range,
    is_repeat: bool,
) -> PieceContent:
    """The content of the images at some consecutive positions; all lists are sorted by position."""
    ends = (positions.start, positions.stop)
    first, last = (bisect_left(content.kept, end) for end in ends)
    unlabelled = [bisect_left(missing, end) for end in ends]
    problems = slice(*(bisect_left(found, end, key=itemgetter(0)) for end in ends))
    boxes = slice(*np.searchsorted(content.image_index, (first, last)).tolist())
    return PieceContent(
        kept=[position - positions.start for position in content.kept[first:last]],
        sizes_wh=content.sizes_wh[first:last],
        boxes_xywh=content.boxes_xywh[boxes],
        category_ids=content.category_ids[boxes],
        image_index=content.image_index[boxes] - first,
        num_missing_labels=unlabelled[1] - unlabelled[0],
        problems=[] if is_repeat else [problem for _, problem in found[problems]],
    )


def _files_without_usable_line(
    label_problems: Sequence[LabelProblem], file_index: NDArray[np.int32]
) -> list[int]:
    """Files that gave no box because their lines could not be read or have unknown classes.

    KITTI's ``DontCare`` regions are no loss.
    """
    lost = {
        problem.file_index
        for problem in label_problems
        if problem.kind in LINE_DROPPED and problem.detail.lower() != "dontcare"
    }
    return sorted(lost.difference(file_index.tolist())) if lost else []


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_file(path: str) -> bytes:
    """The whole file, in half of the time of ``open``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.read(descriptor, _READ_BYTES)
        while more := os.read(descriptor, _READ_BYTES):
            content += more
    finally:
        os.close(descriptor)
    return content


_reader: PieceReader | None = None


def prepare_process(rules: ReadingRules) -> None:
    """Set the rules that :func:`read_pieces` follows in this process."""
    global _reader
    _reader = PieceReader(rules)


def read_pieces(pieces: Sequence[Piece]) -> list[PieceContent]:
    """:meth:`PieceReader.read` by the rules of :func:`prepare_process`.

    Raises:
        RuntimeError: :func:`prepare_process` was not called in this process.
    """
    if _reader is None:
        raise RuntimeError("prepare_process() has to be called before read_pieces()")
    with garbage_collection_paused():
        return _reader.read(pieces)
