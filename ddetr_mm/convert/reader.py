"""Read labels and image sizes in chunks, on several processes, in order."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddetr_mm.convert.kitti import BOX_VERDICTS, FIRST_DROPPED_VERDICT, ClassLookup, clip_boxes, parse_labels
from ddetr_mm.convert.problems import FoundProblem
from ddetr_mm.convert.sequences import LABEL_EXTENSION, image_stem
from ddetr_mm.datasets.image_size import UnreadableImage, read_image_size
from ddetr_mm.files import garbage_collection_paused

# --- Apply a function to many tasks on several processes, and get the results in the tasks' order ---

Task = TypeVar("Task")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# A process works on one task while the next ones wait for it in a pipe.
_TASKS_PER_PROCESS = 3
# Tasks that the calling process can take from while the others work.
_SPARE_TASKS = 8


def can_fork() -> bool:
    """Whether processes may be forked, which start at once; spawned ones first import for half a second.

    Not where there are other threads: one of them may hold a lock that nobody in the copy would ever open.
    """
    return "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1


class _Pending(Generic[Task, Result]):
    """A task, and its result to be, once somebody is at it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.future: Future[Result] | None = None

    def do(self, function: Callable[[Task], Result]) -> None:
        """Do it here and now; an error is kept for the moment at which the result is due."""
        self.future = Future()
        try:
            self.future.set_result(function(self.task))
        except Exception as error:
            self.future.set_exception(error)

    def is_lost(self) -> bool:
        """Whether no result will come, now that the pool is broken."""
        if self.future is None or not self.future.done():
            return True
        return isinstance(self.future.exception(), BrokenProcessPool)


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """Yield ``function(task)`` for each task, in order, whatever process computed it.

    The calling process takes part whenever the result that is due is not ready: it is busy while the
    others start, and does all the work when there are none. Only a few tasks are in flight at a time, so
    ``tasks`` may be a generator of any length. Processes are forked where :func:`can_fork` allows it, else
    spawned; they ignore Ctrl-C (the caller's KeyboardInterrupt ends them) and end when the caller dies. When
    one of them dies the caller does the rest alone.

    Args:
        function: a module-level function.
        tasks: its arguments; must be picklable, like the results.
        num_processes: processes besides this one; 0 for none.
        initializer: called once in every process, this one included, before the first task.
        initargs: its arguments.
    """
    initializer(*initargs)
    if num_processes <= 0:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("fork" if can_fork() else "spawn"),
        initializer=_start_process,
        initargs=(initializer, initargs),
    )
    try:
        yield from _share_out(pool, function, iter(tasks), num_processes * _TASKS_PER_PROCESS)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _share_out(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterator[Task], num_elsewhere: int
) -> Iterator[Result]:
    window: deque[_Pending[Task, Result]] = deque()
    try:
        while True:
            for task in itertools.islice(tasks, num_elsewhere + _SPARE_TASKS - len(window)):
                window.append(_Pending(task))
            if not window:
                return
            _hand_out(pool, function, window, num_elsewhere)
            first = window[0].future
            spare = next((pending for pending in window if pending.future is None), None)
            if spare is not None and not (first and first.done()):
                spare.do(function)
            elif first is not None:
                result = first.result()
                window.popleft()
                yield result
    except BrokenProcessPool:
        logger.warning("a worker process ended unexpectedly; going on in one process")
    for pending in window:
        if pending.is_lost():
            pending.do(function)
        yield pending.future.result()  # type: ignore[union-attr]
    yield from map(function, tasks)


def _hand_out(
    pool: ProcessPoolExecutor,
    function: Callable[[Task], Result],
    window: Iterable[_Pending[Task, Result]],
    num_elsewhere: int,
) -> None:
    """Give waiting tasks to the pool until it has ``num_elsewhere`` to do.

    Tasks are given only when they are about to be done: one that has been given cannot be taken back
    (cancelling it would leave a pool that breaks later in a state in which it never answers).
    """
    missing = num_elsewhere - sum(
        pending.future is not None and not pending.future.done() for pending in window
    )
    # Submitting may start a process, which inherits the blocked signal: Ctrl-C never reaches it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for pending in window:
            if missing > 0 and pending.future is None:
                pending.future = pool.submit(function, pending.task)
                missing -= 1
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


# --- Reading a few hundred images and labels of one sequence: the work that is spread over processes ---

_READ_BYTES = 2**16


@dataclass(frozen=True)
class ReadingRules:
    """What is the same for all chunks of a conversion.

    Attributes:
        category_of_class: label class → category id.
        image_extension: ending that image names have; None: from the last dot on.
        decode_images: decode every image instead of reading its header only.
    """

    category_of_class: Mapping[str, int]
    image_extension: str | None = None
    decode_images: bool = False


@dataclass(frozen=True)
class Chunk:
    """Some images of a sequence.

    Attributes:
        image_dir: folder of the images.
        label_dir: folder of the labels.
        image_prefix: put before image names in reports.
        label_prefix: put before label names in reports.
        names: file names of the images.
        report: False for images that are read a second time: their problems are known.
    """

    image_dir: str
    label_dir: str
    image_prefix: str
    label_prefix: str
    names: list[str]
    report: bool = True


@dataclass
class ChunkContent:
    """What a chunk holds.

    Attributes:
        kept: ``(n,)`` indices into ``Chunk.names`` of the images that can be used.
        sizes_wh: ``(n, 2)`` int32 pixels.
        boxes_xywh: ``(m, 4)`` float64 pixels, clipped to the image.
        category_ids: ``(m,)`` int32.
        image_index: ``(m,)`` int32, ascending: index into ``kept``.
        num_missing_labels: images without a label file.
        problems: in the order of files and lines.
    """

    kept: list[int]
    sizes_wh: NDArray[np.int32]
    boxes_xywh: NDArray[np.float64]
    category_ids: NDArray[np.int32]
    image_index: NDArray[np.int32]
    num_missing_labels: int = 0
    problems: list[FoundProblem] = field(default_factory=list)


class ChunkReader:
    """Reads chunks by fixed rules; keeps what it learnt about class names between them."""

    def __init__(self, rules: ReadingRules) -> None:
        self.rules = rules
        self._lookup = ClassLookup(rules.category_of_class)

    def read(self, chunk: Chunk) -> ChunkContent:
        """Sizes and boxes of a chunk; bad input is reported in the result, never raised."""
        found: list[tuple[int, int, FoundProblem]] = []
        kept, texts, sizes, num_missing = self._read_files(chunk, found)
        columns, label_problems = parse_labels(texts, self._lookup)
        sizes_wh = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        clipped, verdicts = clip_boxes(columns.boxes_xyxy, sizes_wh[columns.file_index])
        for problem in label_problems:
            position = kept[problem.file_index]
            file = self._label_file(chunk, position)
            found.append(
                (position, problem.line, FoundProblem(problem.kind, file, problem.line, problem.detail))
            )
        for row in np.flatnonzero(verdicts):
            position = kept[columns.file_index[row]]
            line = int(columns.line_numbers[row])
            detail = " ".join(f"{value:.10g}" for value in columns.boxes_xyxy[row])
            width, height = sizes_wh[columns.file_index[row]]
            kind = BOX_VERDICTS[verdicts[row]]
            file = self._label_file(chunk, position)
            found.append((position, line, FoundProblem(kind, file, line, f"{detail} in {width}x{height}")))
        found.sort(key=lambda item: item[:2])
        boxes_xywh, good = clipped, verdicts < FIRST_DROPPED_VERDICT
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        return ChunkContent(
            kept=kept,
            sizes_wh=sizes_wh,
            boxes_xywh=boxes_xywh[good],
            category_ids=columns.category_ids[good],
            image_index=columns.file_index[good],
            num_missing_labels=num_missing,
            problems=[problem for _, _, problem in found] if chunk.report else [],
        )

    def _read_files(
        self, chunk: Chunk, found: list[tuple[int, int, FoundProblem]]
    ) -> tuple[list[int], list[bytes], list[tuple[int, int]], int]:
        """Positions, label texts and image sizes of the images that can be used."""
        kept: list[int] = []
        texts: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        num_missing = 0
        for position, name in enumerate(chunk.names):
            image_file = chunk.image_prefix + name
            if not (name.isascii() or _is_utf8(name)):
                shown = image_file.encode("utf-8", "backslashreplace").decode()
                found.append((position, 0, FoundProblem("name_not_utf8", shown, 0, "file name")))
                continue
            label = image_stem(name, self.rules.image_extension) + LABEL_EXTENSION
            try:
                text = _read_file(f"{chunk.label_dir}/{label}")
                size = read_image_size(f"{chunk.image_dir}/{name}", decode=self.rules.decode_images)
            except FileNotFoundError:
                num_missing += 1
                found.append(
                    (position, 0, FoundProblem("missing_label", image_file, 0, chunk.label_prefix + label))
                )
            except OSError as error:
                reason = error.strerror or str(error)
                found.append(
                    (position, 0, FoundProblem("unreadable_label", chunk.label_prefix + label, 0, reason))
                )
            except UnreadableImage as error:
                kind = "truncated_image" if error.truncated else "undecodable_image"
                found.append((position, 0, FoundProblem(kind, image_file, 0, error.reason)))
            else:
                kept.append(position)
                texts.append(text)
                sizes.append(size)
        return kept, texts, sizes, num_missing

    def _label_file(self, chunk: Chunk, position: int) -> str:
        return (
            chunk.label_prefix
            + image_stem(chunk.names[position], self.rules.image_extension)
            + LABEL_EXTENSION
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_file(path: str) -> bytes:
    """The whole file; twice as fast as ``open``, which counts with millions of files of a kilobyte."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.read(descriptor, _READ_BYTES)
        while more := os.read(descriptor, _READ_BYTES):
            content += more
    finally:
        os.close(descriptor)
    return content


_reader: ChunkReader | None = None


def prepare_process(rules: ReadingRules) -> None:
    """Set the rules by which :func:`read_chunk` works in this process."""
    global _reader
    _reader = ChunkReader(rules)


def read_chunk(chunk: Chunk) -> ChunkContent:
    """:meth:`ChunkReader.read` by the rules of :func:`prepare_process`.

    Raises:
        RuntimeError: :func:`prepare_process` was not called in this process.
    """
    if _reader is None:
        raise RuntimeError("prepare_process() has to be called before read_chunk()")
    with garbage_collection_paused():
        return _reader.read(chunk)
