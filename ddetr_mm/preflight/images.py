"""Checks of image files: present, whole, of the recorded size, unchanged, not empty, and there once only."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddetr_mm.datasets.image_size import IMAGE_EXTENSIONS, UnreadableImage, read_image_size
from ddetr_mm.datasets.images import decode_image
from ddetr_mm.preflight.inputs import Split
from ddetr_mm.preflight.report import Finding, Section, fault, note

# --- Files against the annotations ---

SAMPLE = 200
"""Image files of a split of which the header is read without ``full``, evenly spread."""

DECODED = 64
"""Image files of a split that are decoded without ``full``."""

LEAST_RANGE = 5
"""Grey levels that an image must cover, a thousandth of its pixels at either end aside."""

_MEASURED_SIDE_PX = 384

_EXIF_ORIENTATION = 0x0112
_SEARCHED_FOLDERS = 200


@dataclass
class FileStates:
    """State of the files of one source. Rows are image rows of the split's table.

    Attributes:
        missing: rows without a file.
        broken: row → why it cannot be read.
        transposed: rows whose recorded width is the file's height and the reverse.
        exif_turned: those of them that an EXIF tag rotates.
        other_size: row → (recorded width, height, the file's width, height) of the other wrong sizes.
        constant: rows of images that are nearly of one colour once decoded.
        seen: number of files read.
        decoded: number of files decoded.
    """

    missing: list[int] = field(default_factory=list)
    broken: dict[int, str] = field(default_factory=dict)
    transposed: list[int] = field(default_factory=list)
    exif_turned: list[int] = field(default_factory=list)
    other_size: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    constant: list[int] = field(default_factory=list)
    seen: int = 0
    decoded: int = 0


def check_images(
    split: Split, *, full: bool = False, sample: int = SAMPLE, decoded: int = DECODED
) -> Section:
    """The files of one split: a sample by their headers, some of them decoded, or with ``full`` all decoded.

    Args:
        split: the data.
        full: decode all files.
        sample: how many headers are read otherwise.
        decoded: how many of these files are decoded, as training decodes them.
    """
    section = Section(f"images of {split.name}")
    rows = split.spread_rows(None if full else sample)
    urls = int(sum(split.is_url(row) for row in rows.tolist()))
    if urls:
        section.lines.append(f"{urls:,} images at URLs are not looked at")
    rows = rows[[not split.is_url(row) for row in rows.tolist()]]
    states = read_files(split, rows, decode=full, every=1 if full else max(1, -(-len(rows) // decoded)))
    how = "decoded" if full else f"checked, {sum(state.decoded for state in states.values())} of them decoded"
    if len(rows) < split.table.num_images:
        how += " (--full decodes all)"
    section.lines.append(f"{len(rows):,} of {split.table.num_images:,} image files {how}")
    section.data |= dict(num_seen=len(rows), num_images=split.table.num_images)
    empty = int((np.diff(split.table.box_starts) == 0).sum())
    section.data["num_images_without_objects"] = empty
    if empty:
        share = f"{empty:,} of {split.table.num_images:,} images show no object"
        section.findings.append(note("images-without-objects", share, where=split.where))
    for source, state in sorted(states.items()):
        section.findings += _judged(split, source, state)
    return section


def read_files(split: Split, rows: np.ndarray, *, decode: bool, every: int = 1) -> dict[int, FileStates]:
    """Source number → state of its files.

    Args:
        split: the data.
        rows: the images.
        decode: read sizes by decoding with Pillow, which finds damage that others overlook.
        every: decode each so-manieth image as training does.
    """
    found: dict[int, FileStates] = {}
    for number, row in enumerate(rows.tolist()):
        state = found.setdefault(int(split.table.source_indices[row]), FileStates())
        state.seen += 1
        path = split.path(row)
        if not path.is_file():
            state.missing.append(row)
            continue
        try:
            width, height = read_image_size(str(path), decode=decode)
            if number % every == 0:
                state.decoded += 1
                if is_constant(decode_image(path.read_bytes())):
                    state.constant.append(row)
        except (UnreadableImage, OSError) as error:
            state.broken[row] = str(error)
            continue
        recorded_height, recorded_width = split.table.sizes_hw[row].tolist()
        if (recorded_width, recorded_height) == (width, height):
            continue
        if (recorded_width, recorded_height) == (height, width):
            state.transposed.append(row)
            if is_turned_by_exif(path):
                state.exif_turned.append(row)
        else:
            state.other_size[row] = (recorded_width, recorded_height, width, height)
    return found


def is_turned_by_exif(path: Path) -> bool:
    """Whether a readable image carries an EXIF tag that exchanges width and height."""
    with Image.open(path) as image:
        return image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)


def _judged(split: Split, source: int, state: FileStates) -> Iterator[Finding]:
    where = f"{split.where}[{source}]"
    folder = split.sources[source].image_dir
    if state.missing and len(state.missing) == state.seen:
        yield _wrong_folder(split, source, state)
    elif state.missing:
        yield _some_missing(split, source, state)
    if state.broken:
        row, reason = next(iter(state.broken.items()))
        yield fault(
            "images-broken",
            f"{len(state.broken)} of {state.seen} image files cannot be read, the first: "
            f"{split.path(row)}: {reason}",
            where=where,
            hint="write or copy them again, or leave them out of the annotations",
        )
    yield from _constant(split, where, state)
    yield from _transposed(split, where, state)
    if state.other_size:
        row, (recorded_width, recorded_height, width, height) = next(iter(state.other_size.items()))
        scales = np.array([(w / rw, h / rh) for rw, rh, w, h in state.other_size.values()])
        resized = bool(np.allclose(scales, scales[0], rtol=0.02)) and len(scales) > 1
        yield fault(
            "images-resized" if resized and len(scales) == state.seen else "annotations-stale",
            f"{len(state.other_size)} of {state.seen} images have another size than the annotations say, the "
            f"first: {split.path(row)} is {width}x{height}, recorded as {recorded_width}x{recorded_height}"
            + (f"; all are {scales[0][0]:.3g} times as wide" if resized else ""),
            file=split.sources[source].json_file,
            where=where,
            value=folder,
            hint="the images were changed after they were annotated: annotate or convert anew",
        )


def _constant(split: Split, where: str, state: FileStates) -> Iterator[Finding]:
    """Nearly one colour: with boxes the pixels are lost, without any it may be a covered camera."""
    objects = np.diff(split.table.box_starts)
    for word, build in (("with", fault), ("without", note)):
        paths = [str(split.path(row)) for row in state.constant if (objects[row] > 0) == (word == "with")]
        if paths:
            yield build(
                "images-constant",
                f"{len(paths)} of {state.decoded} decoded images {word} objects are nearly of one colour as "
                f"the network sees them, the first: {', '.join(paths[:3])}",
                where=where,
                hint="look at them; if they are not empty, write their values stretched to 8 bits",
            )


def is_constant(image_rgb: npt.NDArray[np.uint8]) -> bool:
    """Whether all channels of an image cover less than :data:`LEAST_RANGE` levels."""
    step = max(1, max(image_rgb.shape[:2]) // _MEASURED_SIDE_PX)
    values = np.sort(image_rgb[::step, ::step].reshape(-1, 3), axis=0)
    left_out = len(values) // 1000
    spread = values[len(values) - 1 - left_out].astype(int) - values[left_out]
    return bool((spread < LEAST_RANGE).all())


def _transposed(split: Split, where: str, state: FileStates) -> Iterator[Finding]:
    if not state.transposed:
        return
    row = state.transposed[0]
    height, width = split.table.sizes_hw[row].tolist()
    text = (
        f"{len(state.transposed)} of {state.seen} images have width and height exchanged in the annotations, "
        f"the first: {split.path(row)} is {height}x{width} (width x height), recorded as {width}x{height}"
    )
    if len(state.exif_turned) == len(state.transposed):
        yield note(
            "sizes-before-exif",
            text + "; an EXIF tag rotates these images",
            where=where,
            hint="make sure that the boxes belong to the image as it is shown",
        )
    else:
        yield fault(
            "sizes-transposed",
            text,
            where=where,
            hint="write the width into 'width' and the height into 'height'",
        )


def _wrong_folder(split: Split, source: int, state: FileStates) -> Finding:
    folder = split.sources[source].image_dir
    name = split.table.file_name(state.missing[0])
    elsewhere = find_folder(folder, name)
    exists = Path(folder).is_dir() if folder else True
    return fault(
        "images-in-wrong-folder",
        (
            f"none of {state.seen} checked images exists, the first: {split.path(state.missing[0])}"
            if exists
            else "the folder does not exist"
        ),
        where=f"{split.where}[{source}].image_dir",
        value=folder,
        hint=f"there are such images below {elsewhere}: give that as image_dir"
        if elsewhere
        else "file_name in the annotations must be relative to image_dir",
    )


def find_folder(folder: str, name: str) -> str | None:
    """A folder near ``folder`` in which ``name`` exists: above it, or one or two levels below or beside."""
    start = Path(folder or ".")
    candidates = [*list(start.parents)[:3]]
    for base in (start, start.parent):
        if base.is_dir():
            below = [entry for entry in sorted(base.iterdir())[:_SEARCHED_FOLDERS] if entry.is_dir()]
            candidates += below
            candidates += [inner / part for inner in below for part in ("images", "train", "val", "test")]
    return next((str(path) for path in candidates if (path / name).is_file()), None)


def _some_missing(split: Split, source: int, state: FileStates) -> Finding:
    unlisted = unlisted_images(split, source, split.path(state.missing[0]).parent)
    text = (
        f"{len(state.missing)} of {state.seen} checked images do not exist, the first: "
        f"{split.path(state.missing[0])}"
    )
    where = f"{split.where}[{source}]"
    if unlisted:
        return fault(
            "annotations-stale",
            f"the annotations do not belong to this state of the folder: {text}; {len(unlisted)} images in "
            f"the folder are not listed, the first: {unlisted[0]}",
            file=split.sources[source].json_file,
            where=where,
            hint="annotate or convert anew",
        )
    return fault(
        "images-missing",
        text,
        where=where,
        hint="put the files there, or leave the images out of the annotations",
    )


def unlisted_images(split: Split, source: int, folder: Path) -> list[str]:
    """Names of image files in one folder that the split's annotations do not list."""
    if not folder.is_dir():
        return []
    rows = np.flatnonzero(split.table.source_indices == source)
    listed = {os.path.normpath(split.path(int(row))) for row in rows}
    present = (entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_EXTENSIONS)
    return sorted(entry.name for entry in present if os.path.normpath(entry) not in listed)


def check_ages(split: Split, rows: Sequence[int]) -> Section:
    """Whether images changed after the annotations were written; a copied data set keeps no times."""
    section = Section(f"ages of {split.name}")
    for number, source in enumerate(split.sources):
        newest_file = max(path.stat().st_mtime for path in source.files())
        mine = [row for row in rows if int(split.table.source_indices[row]) == number]
        times = [path.stat().st_mtime for path in map(split.path, mine) if path.is_file()]
        later = sum(time > newest_file + 24 * 3600 for time in times)
        if times and later > len(times) / 2:
            section.findings.append(
                note(
                    "annotations-older",
                    f"{later} of {len(times)} images are newer than their annotation file by more than a day",
                    file=source.json_file,
                    where=f"{split.where}[{number}]",
                )
            )
    return section


# --- Equal images, compared by content ---

MOST_HASHED = 4000
"""Files of equal size that are read at most, where not all are asked for."""


def check_overlap(splits: Sequence[Split], *, full: bool = False) -> Section:
    """Compare the images of every two splits.

    Only files of equal size can be equal, so sizes are compared first and few files are read.
    """
    section = Section("images in two splits")
    sizes = {split.name: files_by_size(split) for split in splits}
    for first, second in combinations(splits, 2):
        shared_sizes = set(sizes[first.name]) & set(sizes[second.name])
        one = [path for size in sorted(shared_sizes) for path in sizes[first.name][size]]
        other = [path for size in sorted(shared_sizes) for path in sizes[second.name][size]]
        complete = full or len(one) + len(other) <= MOST_HASHED
        if not complete:
            one, other = one[: MOST_HASHED // 2], other[: MOST_HASHED // 2]
        digests = digests_of(one)
        equal = [(digests[digest], path) for path in other if (digest := digest_of(path)) in digests]
        section.lines.append(
            f"{first.name} and {second.name}: {len(equal)} equal images"
            + ("" if complete else f" among {len(one) + len(other):,} files read (--full reads all)")
        )
        section.data[f"{first.name}-{second.name}"] = len(equal)
        if not equal:
            continue
        share = len(equal) / max(second.table.num_images, 1)
        # A few may be an oversight; with a large share validation measures what was memorised.
        build = fault if share > 0.5 and first.name == "train" else note
        section.findings.append(
            build(
                "splits-overlap",
                f"{len(equal)} images of {second.name} ({share:.0%}) are in {first.name} too, the first: "
                f"{equal[0][1]} is {equal[0][0]}",
                where=f"{first.where} and {second.where}",
                hint="split the data anew so that no image is in two parts",
            )
        )
    return section


def check_doubles(split: Split, *, full: bool = False) -> Section:
    """Equal images inside one split, under different names."""
    section = Section(f"equal images in {split.name}")
    groups = [sorted(set(paths)) for _, paths in sorted(files_by_size(split).items())]
    candidates = [path for paths in groups if len(paths) > 1 for path in paths]
    complete = full or len(candidates) <= MOST_HASHED
    by_content: dict[bytes, list[Path]] = defaultdict(list)
    for path in candidates if complete else candidates[:MOST_HASHED]:
        by_content[digest_of(path)].append(path)
    doubled = [paths for paths in by_content.values() if len(paths) > 1]
    more = sum(len(paths) - 1 for paths in doubled)
    section.lines.append(
        f"{more:,} images are copies of another one"
        + ("" if complete else f", among {MOST_HASHED:,} files read (--full reads all)")
    )
    section.data["num_copies"] = more
    if doubled:
        section.findings.append(
            note(
                "images-doubled",
                f"{more:,} of {split.table.num_images:,} images of {split.name} are copies of another one, "
                f"the first: {doubled[0][1]} is {doubled[0][0]}",
                where=split.where,
                hint="keep one of each: copies count more than other images",
            )
        )
    return section


def files_by_size(split: Split) -> dict[int, list[Path]]:
    """Size in bytes → the image files of that size; missing files are left out."""
    found: dict[int, list[Path]] = defaultdict(list)
    for row in range(split.table.num_images):
        if split.is_url(row):
            continue
        path = split.path(row)
        try:
            found[path.stat().st_size].append(path)
        except OSError:
            continue  # reported by the check of the files
    return found


def digests_of(paths: Iterable[Path]) -> dict[bytes, Path]:
    """Digest of the content → the file."""
    return {digest_of(path): path for path in paths}


def digest_of(path: Path) -> bytes:
    """Digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
