"""``ddetr-mm predict CHECKPOINT SOURCE…``: pictures and videos through a network, without a spec."""

from __future__ import annotations

import glob
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image

from ddetr_mm import __version__
from ddetr_mm.datasets.image_size import IMAGE_EXTENSIONS
from ddetr_mm.datasets.sources import SkippedFile, find_images
from ddetr_mm.engine.detections import (
    IMAGES_FOLDER,
    LABELS_FOLDER,
    ResultNames,
    result_names,
    save_image,
    write_kitti_labels,
)
from ddetr_mm.engine.progress import Progress
from ddetr_mm.errors import DataError, InputError, Problem, printable
from ddetr_mm.files import written_whole
from ddetr_mm.outputs import (
    claim,
    only_writer,
    protected_inputs,
    remove_leftovers,
    require_free,
    results_root,
)
from ddetr_mm.tasks.detector import Detector, Result, as_rgb, check_arguments, print_notes
from ddetr_mm.weights.entries import EMA_OPTION

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
PREDICTIONS_NAME = "predictions.json"
VIDEOS_FOLDER = "videos_annotated"
VIDEO_CODEC = "mp4v"
"""MPEG-4, which every build of OpenCV writes."""

_FEWEST_FOR_PACE = 10
_SKIPPED_SHOWN = 20


# --- Sources ---


@dataclass
class Sources:
    """What the command line names.

    Attributes:
        pictures: image files.
        videos: video files.
        cameras: indices of cameras.
        skipped: files of a folder that look like images and are none.
    """

    pictures: list[Path] = field(default_factory=list)
    videos: list[Path] = field(default_factory=list)
    cameras: list[int] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """Pictures and videos."""
        return [*self.pictures, *self.videos]


def find_sources(texts: Sequence[str]) -> Sources:
    """Find what a command line's sources name: image and video files, folders, patterns, camera indices.

    A folder stands for the images in it; a pattern (``shots/*.jpg``, ``**`` for any depth) for files of
    either kind. A file that is named twice counts once.

    Raises:
        DataError: a source does not exist, is of no known kind, or is a URL; or there is none at all.
    """
    found = Sources()
    problems: list[Problem] = []
    for text in texts:
        path = Path(text)
        if path.is_dir():
            try:
                images, skipped = find_images([path])
                found.pictures += images
                found.skipped += skipped
            except DataError as error:
                problems += error.problems
        elif path.is_file():
            problems += _add_file(found, path)
        elif text.isdecimal():
            found.cameras.append(int(text))
        elif "://" in text:
            hint = "copy the file to this machine"
            problems.append(Problem("sources are not fetched", where="SOURCE", value=text, hint=hint))
        elif glob.has_magic(text):
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
            known = [match for match in matches if match.is_file() and _kind(match)]
            if not known:
                problems.append(Problem("no image or video fits the pattern", where="SOURCE", value=text))
            for match in known:
                _add_file(found, match)
        else:
            allowed = "an image, a video, a folder, a pattern, or the number of a camera"
            problems.append(Problem("does not exist", where="SOURCE", value=text, allowed=allowed))
    DataError.collect(problems)
    found.pictures, found.videos = _once(found.pictures), _once(found.videos)
    return found


def _add_file(found: Sources, path: Path) -> list[Problem]:
    kind = _kind(path)
    if kind is None:
        allowed = ", ".join([*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS])
        return [Problem("is neither an image nor a video by its ending", file=path, allowed=allowed)]
    (found.pictures if kind == "picture" else found.videos).append(path)
    return []


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in IMAGE_EXTENSIONS:
        return "picture"
    return "video" if suffix in VIDEO_EXTENSIONS else None


def _once(paths: Iterable[Path]) -> list[Path]:
    return list({path.resolve(): path for path in paths}.values())


# --- Results ---


@contextmanager
def results_folder(
    folder: Path, sources: Sources, checkpoint: Path, *, save_txt: bool
) -> Iterator[dict[Path, ResultNames]]:
    """Make the results folder and check that nothing of another origin is in the way.

    Yields:
        The names of results of files that share a name, see :func:`ddetr_mm.engine.detections.result_names`.

    Raises:
        DataError: a result would replace a source or a file that no prediction wrote, or another one runs.
    """
    pictures, videos = result_names(sources.pictures), result_names(sources.videos)
    targets = [folder / PREDICTIONS_NAME]
    for path in sources.pictures:
        names = pictures.get(path, ResultNames.of(path))
        targets.append(folder / IMAGES_FOLDER / names.picture)
        targets += [folder / LABELS_FOLDER / names.label] if save_txt else []
    for path in sources.videos:
        targets.append(video_file(folder, videos.get(path, ResultNames.of(path)).picture))
    targets += [video_file(folder, f"camera_{index}") for index in sources.cameras]
    if folder.exists() and not folder.is_dir():
        raise DataError(Problem("is no folder", file=folder, where="--out"))
    folder.mkdir(parents=True, exist_ok=True)
    with (
        protected_inputs([*sources.files, checkpoint]),
        results_root(folder),
        only_writer(folder, "ddetr-mm predict"),
    ):
        for place in (folder, folder / IMAGES_FOLDER, folder / LABELS_FOLDER, folder / VIDEOS_FOLDER):
            remove_leftovers(place)
        require_free(targets)
        yield {**pictures, **videos}


def video_file(folder: Path, name: str) -> Path:
    """The annotated video of a source of this name."""
    return folder / VIDEOS_FOLDER / f"{Path(name).stem if Path(name).suffix else name}.mp4"


class PredictionsFile:
    """Writes ``predictions.json`` picture by picture, so that a long video needs no memory.

    Args:
        stream: the open file.
        detector: whose file, classes and threshold are named in it.
    """

    def __init__(self, stream: TextIO, detector: Detector) -> None:
        self.stream = stream
        head = dict(
            ddetr_mm=__version__,
            checkpoint=str(detector.path),
            conf=detector.conf,
            categories=[dict(id=label, name=name) for label, name in detector.names.items()],
        )
        stream.write(f"{json.dumps(head, ensure_ascii=False)[:-1]},\n")
        stream.write(' "images": [')
        self._first = True

    def add(self, name: str, result: Result, **about: Any) -> None:
        """Write the detections of a picture or a video's frame."""
        detections = [
            {key: _short(value) for key, value in one.items() if key != "image_id"}
            for one in result.to_coco()
        ]
        height, width = result.size_hw
        entry = dict(file=name, **about, width=width, height=height, detections=detections)
        self.stream.write(("" if self._first else ",") + "\n  " + json.dumps(entry, ensure_ascii=False))
        self._first = False

    def end(self, skipped: Sequence[SkippedFile]) -> None:
        """Write what was skipped, and close the JSON."""
        left_out = [dict(file=str(one.path), reason=one.reason) for one in skipped]
        self.stream.write(f'\n ],\n "skipped": {json.dumps(left_out, ensure_ascii=False)}}}\n')


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [round(number, 3) for number in value]
    return round(value, 6) if isinstance(value, float) else value


# --- The command ---


@dataclass
class _Counts:
    pictures: int = 0
    frames: int = 0
    objects: int = 0
    started: float = field(default_factory=time.monotonic)


def run(arguments: Namespace) -> None:
    """``ddetr-mm predict``: annotated pictures and videos, ``predictions.json``, label files on request.

    Raises:
        DataError: a source does not exist, or none can be read.
        WeightsError: the checkpoint cannot be used.
    """
    numbers = _numbers(arguments)
    sources = find_sources(arguments.sources)
    folder, checkpoint = Path(arguments.out), Path(arguments.checkpoint)
    with results_folder(folder, sources, checkpoint, save_txt=arguments.save_txt) as names:
        _predict(arguments, detector_of(arguments, numbers), sources, folder, names)


def _numbers(arguments: Namespace) -> dict[str, Any]:
    """The numbers for a :class:`Detector`, checked."""
    numbers = {name: getattr(arguments, name) for name in ("conf", "batch_size", "precision")}
    numbers["size"] = tuple(arguments.size) if arguments.size else None
    check_arguments(**numbers, name=lambda name: f"--{name.replace('_', '-')}")
    return numbers


def _predict(
    arguments: Namespace,
    detector: Detector,
    sources: Sources,
    folder: Path,
    names: Mapping[Path, ResultNames],
) -> None:
    print_notes(detector)
    skipped = list(sources.skipped)
    counts = _Counts()
    interrupted = None
    with written_whole(folder / PREDICTIONS_NAME) as temporary, temporary.open("w", encoding="utf-8") as file:
        job = _Job(detector, folder, PredictionsFile(file, detector), arguments, names, counts, skipped)
        try:
            job.pictures(sources.pictures)
            for path in sources.videos:
                job.video(str(path), path, names.get(path, ResultNames.of(path)).picture)
            for index in sources.cameras:
                job.video(f"camera {index}", index, f"camera_{index}")
        except KeyboardInterrupt as error:
            interrupted = error  # what is done so far stays
        job.predictions.end(skipped)
    _report(counts, skipped, folder, arguments)
    if not counts.objects and detector.highest_score > 0:
        score = f"the highest score is {detector.highest_score:.2g}"
        print(f"note: {score}, below --conf {arguments.conf:g}; try a lower --conf", file=sys.stderr)
    if interrupted is not None:
        raise interrupted
    if not counts.pictures and not counts.frames:
        raise DataError(Problem("none of the sources can be read", where="SOURCE", value=arguments.sources))


def detector_of(arguments: Namespace, numbers: Mapping[str, Any]) -> Detector:
    """The detector that the command's options ask for.

    Raises:
        WeightsError: the checkpoint cannot be used.
        DataError: an option is out of range or contradicts the checkpoint.
    """
    key = None
    if arguments.key_file:
        try:
            key = Path(arguments.key_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(Problem(f"the key cannot be read: {error}", where="--key-file")) from None
    return Detector(
        arguments.checkpoint,
        **numbers,
        device=arguments.device,
        classes=arguments.classes,
        class_names=arguments.class_names,
        entry=arguments.entry,
        use_ema=EMA_OPTION.get(arguments.ema, "auto"),
        encryption_key=key,
    )


@dataclass
class _Job:
    """What the sources are predicted with, and where the results go."""

    detector: Detector
    folder: Path
    predictions: PredictionsFile
    arguments: Namespace
    names: Mapping[Path, ResultNames]
    counts: _Counts
    skipped: list[SkippedFile]

    def pictures(self, paths: Sequence[Path]) -> None:
        """Predict image files; those that cannot be read are skipped."""
        if not paths:
            return
        with Progress("predicting", len(paths), "images") as progress:
            waiting = self._readable(paths, progress)
            while batch := list(islice(waiting, self.detector.batch_size)):
                results = self.detector([array for _, array in batch])
                for (path, _array), result in zip(batch, results, strict=True):
                    self._write_picture(path, result)
                    progress.advance()

    def _readable(self, paths: Sequence[Path], progress: Progress) -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, as_rgb(path)
            except DataError as error:
                reason = "; ".join(problem.what for problem in error.problems)
                self.skipped.append(SkippedFile(path, reason))
                progress.advance()

    def _write_picture(self, path: Path, result: Result) -> None:
        target = self.names.get(path, ResultNames.of(path))
        if self.arguments.save_txt:
            label_file = self.folder / LABELS_FOLDER / target.label
            write_kitti_labels(label_file, result.names, result.boxes_xyxy, result.scores)
        save_image(self.folder / IMAGES_FOLDER / target.picture, self._drawn(result))
        self.predictions.add(str(path), result)
        self.counts.pictures += 1
        self.counts.objects += len(result)

    def video(self, name: str, source: Path | int, target_name: str) -> None:
        """Predict a video or a camera's pictures, and write an annotated video.

        Raises:
            DataError: it cannot be opened, or no frame can be read.
        """
        capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        with ExitStack() as stack:
            stack.callback(capture.release)
            if not capture.isOpened():
                camera = isinstance(source, int)
                hint = "a camera needs a driver and access to /dev/video*" if camera else None
                raise DataError(Problem("cannot be opened as a video", file=name, hint=hint))
            rate = capture.get(cv2.CAP_PROP_FPS)
            rate = rate if 0 < rate <= 1000 else 25.0
            total = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
            target = video_file(self.folder, target_name)
            temporary = stack.enter_context(written_whole(target))
            progress = stack.enter_context(Progress(f"predicting {Path(name).name}", total, "frames"))
            try:
                self._frames(name, capture, temporary, rate, progress)
            except KeyboardInterrupt:
                if temporary.stat().st_size:
                    claim(target)
                    temporary.replace(target)
                raise

    def _frames(
        self, name: str, capture: cv2.VideoCapture, temporary: Path, rate: float, progress: Progress
    ) -> None:
        writer: cv2.VideoWriter | None = None
        frames, number = _frames(capture), 0
        try:
            while batch := list(islice(frames, self.detector.batch_size)):
                for result in self.detector(batch):
                    drawn_bgr = np.ascontiguousarray(np.asarray(self._drawn(result))[:, :, ::-1])
                    writer = writer or _video_writer(temporary, rate, drawn_bgr)
                    writer.write(drawn_bgr)
                    self.predictions.add(name, result, frame=number, time_s=round(number / rate, 4))
                    number += 1
                    self.counts.frames += 1
                    self.counts.objects += len(result)
                    progress.advance()
        finally:
            if writer is not None:
                writer.release()
        if writer is None:
            raise DataError(Problem("has no frame that can be read", file=name))

    def _drawn(self, result: Result) -> Image.Image:
        return result.plot(show_labels=self.arguments.show_labels)


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        ok, frame_bgr = capture.read()
        if not ok:
            return
        yield np.ascontiguousarray(frame_bgr[:, :, ::-1])


def _video_writer(path: Path, rate: float, frame: np.ndarray) -> cv2.VideoWriter:
    height, width = frame.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*VIDEO_CODEC), rate, (width, height))
    if not writer.isOpened():
        what = f"OpenCV cannot write {VIDEO_CODEC} videos of {width}x{height}"
        raise InputError(Problem(what, file=path))
    return writer


def _report(counts: _Counts, skipped: Sequence[SkippedFile], folder: Path, arguments: Namespace) -> None:
    parts = [f"{counts.pictures} images"] if counts.pictures or not counts.frames else []
    parts += [f"{counts.frames} frames"] if counts.frames else []
    places = [PREDICTIONS_NAME]
    places += [IMAGES_FOLDER] if counts.pictures else []
    places += [VIDEOS_FOLDER] if counts.frames else []
    places += [LABELS_FOLDER] if counts.pictures and arguments.save_txt else []
    seconds, number = time.monotonic() - counts.started, counts.pictures + counts.frames
    # Of a few images the start of the network is most of the time.
    pace = f"{number / seconds:.3g} a second" if number >= _FEWEST_FOR_PACE else f"{seconds:.1f} s"
    listed = ", ".join(f"{folder}/{one}" for one in places)
    print(f"{counts.objects} objects in {' and '.join(parts)}, {pace}: {listed}")
    if skipped:
        print(f"note: {len(skipped)} files were skipped, listed in {PREDICTIONS_NAME}", file=sys.stderr)
        for one in skipped[:_SKIPPED_SHOWN]:
            print(f"  - {printable(one.path)}: {printable(one.reason)}", file=sys.stderr)
