"""Sources of data: image folders with COCO annotation files, and folders of images without annotations."""

from __future__ import annotations

import glob
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddetr_mm.datasets.annotation_cache import cached_table
from ddetr_mm.datasets.coco_json import (
    EXAMPLES_SHOWN,
    JsonColumns,
    Repair,
    parse_categories,
    parse_coco_json,
    refusal,
)
from ddetr_mm.datasets.coco_table import (
    CocoTable,
    ParsedSource,
    build_table,
    check_file_names,
    left_out_categories,
)
from ddetr_mm.datasets.image_size import IMAGE_EXTENSIONS, UnreadableImage, read_image_size
from ddetr_mm.errors import DataError, Problem

STORAGES = ("shared", "process")


@contextmanager
def mmdet_names(used: bool = True) -> Iterator[None]:
    """Have errors within the block name mmdet's arguments, ``ann_file`` and ``data_prefix``.

    Args:
        used: False where ``sources`` were given, with ``json_file`` and ``image_dir``.
    """
    try:
        yield
    except DataError as error:
        if not used:
            raise
        raise DataError(*map(_named_as_in_mmdet, error.problems)) from None


def _named_as_in_mmdet(problem: Problem) -> Problem:
    words = {"json_file": "ann_file", "image_dir": "data_prefix['img']"}
    texts = {name: getattr(problem, name) for name in ("what", "where", "hint")}
    for ours, theirs in words.items():
        texts = {name: text and re.sub(rf"\b{ours}\b", theirs, text) for name, text in texts.items()}
    return replace(problem, **texts)


@dataclass(frozen=True)
class CocoSource:
    """Images with their COCO annotations.

    Attributes:
        image_dir: the folder that the files' ``file_name`` are relative to; empty for none.
        json_file: an annotation file, a pattern (``shards/*.json``, ``**`` for any depth), or a folder
            of ``.json`` shards. Of the results of ``ddetr-mm convert`` only the shards are read.
    """

    image_dir: str
    json_file: str

    @classmethod
    def of(cls, source: CocoSource | Mapping[str, Any]) -> CocoSource:
        """A source from its mapping form ``{image_dir, json_file}``.

        Raises:
            DataError: a key is missing, unknown, or no path.
        """
        if isinstance(source, cls):
            return source
        allowed = ("image_dir", "json_file")
        if not isinstance(source, Mapping):
            raise DataError(
                Problem("is no data source", value=source, allowed="a mapping of " + ", ".join(allowed))
            )
        problems = [
            Problem("unknown key in a data source", value=key, allowed=allowed)
            for key in source
            if key not in allowed
        ]
        for key in allowed:
            if not isinstance(source.get(key), (str, os.PathLike)):
                problems.append(
                    Problem(f"a data source needs {key}", value=source.get(key), allowed="a path")
                )
        DataError.collect(problems)
        return cls(image_dir=os.fspath(source["image_dir"]), json_file=os.fspath(source["json_file"]))

    def image_path(self, file_name: str) -> str:
        """Path of an image of this source, or its URL where ``image_dir`` is one."""
        return join_location(self.image_dir, file_name)

    def below(self, root: str) -> CocoSource:
        """The same source with relative paths taken relative to ``root``."""
        return CocoSource(join_location(root, self.image_dir), join_location(root, self.json_file))

    def files(self) -> list[Path]:
        """The annotation files, sorted by name.

        Raises:
            DataError: none is named, the file does not exist, or nothing matches the pattern, or the folder
                holds no ``.json`` file.
        """
        if not self.json_file.strip():  # as a path it would be the current folder
            raise DataError(Problem("is not given", where="json_file", hint="name an annotation file"))
        if "://" in self.json_file:
            hint = "copy the file to this machine"
            raise DataError(Problem("annotation files are not fetched", self.json_file, hint=hint))
        path = Path(self.json_file)
        if path.is_file():
            return [path]
        if path.is_dir():
            found = _files_of_folder(path)
            searched = path / "**" / "*.json"
        elif glob.has_magic(self.json_file):
            matches = map(Path, glob.glob(self.json_file, recursive=True))
            found = sorted(item for item in matches if item.is_file())
            searched = path
        else:
            raise DataError(Problem("annotation file does not exist", path, hint="correct json_file"))
        if not found:
            what = "there is no annotation file"
            raise DataError(Problem(what, searched, hint="correct the pattern or folder in json_file"))
        return found


_SHARD_NAME = re.compile(r".+-shard-\d+-of-\d+\.json(\.gz)?")
_RESULT_NAMES = ("status.json", "warnings.json")


def _files_of_folder(folder: Path) -> list[Path]:
    """The annotation files below a folder: where there are shards of a conversion, those alone."""
    files = (item for pattern in ("*.json", "*.json.gz") for item in folder.rglob(pattern))
    found = sorted(item for item in files if item.is_file() and item.name not in _RESULT_NAMES)
    return [item for item in found if _SHARD_NAME.fullmatch(item.name)] or found


def join_location(folder: str, name: str) -> str:
    """``name`` below ``folder``; ``name`` itself where it is absolute, a URL, or there is no folder."""
    if not folder or name.startswith("/") or "://" in name:
        return name
    if not name:
        return folder
    return folder + name if folder.endswith("/") else f"{folder}/{name}"


def read_coco_sources(
    sources: Sequence[CocoSource | Mapping[str, Any]],
    *,
    annotations_required: bool = True,
    with_masks: bool = False,
    storage: str = "process",
    strict: bool = False,
    sizes_required: bool = True,
    numbered_names: Sequence[str | None] | None = None,
    merge_categories: bool = False,
) -> CocoTable:
    """Read and merge all sources.

    Args:
        sources: in order; mappings with ``image_dir`` and ``json_file`` are accepted.
        annotations_required: whether a file without ``annotations`` (a test set) is an error.
        with_masks: keep segmentations too.
        storage: ``'process'``: parse, and keep the columns in this process; ``'shared'``: one parse and
            one copy a machine, see :mod:`ddetr_mm.datasets.annotation_cache`.
        strict: annotations that have to be left out are an error, see
            :func:`~ddetr_mm.datasets.coco_table.build_table`.
        sizes_required: read the sizes that a file lacks from the images. The cache keeps them until the
            annotation file changes.
        numbered_names: number the classes by these names instead of the files' ids, see
            :func:`~ddetr_mm.datasets.coco_table.resolve_categories`.
        merge_categories: take categories of one name for one class instead of refusing them.

    Raises:
        DataError: anything that is wrong with the files, see
            :func:`~ddetr_mm.datasets.coco_json.parse_coco_json` and
            :func:`~ddetr_mm.datasets.coco_table.build_table`.
        ValueError: no such storage.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {storage!r}")
    wanted = [CocoSource.of(source) for source in sources]
    if not wanted:
        raise DataError(Problem("no data source is given", hint="give image_dir and json_file"))
    files = [source.files() for source in wanted]

    def build() -> CocoTable:
        parsed = []
        for source, paths in zip(wanted, files, strict=True):
            columns = [_parse_file(path, with_masks) for path in paths]
            part = ParsedSource(tuple(paths), tuple(columns), has_folder=bool(source.image_dir))
            parsed.append(_with_sizes(source, part) if sizes_required else part)
        return build_table(
            parsed, strict=strict, numbered_names=numbered_names, merge_repeated=merge_categories
        )

    folders = [
        source.image_dir if "://" in source.image_dir else os.path.abspath(source.image_dir)
        for source in wanted
    ]
    options = [folders, [bool(source.image_dir) for source in wanted], with_masks, strict, sizes_required]
    options += [None if numbered_names is None else list(numbered_names), merge_categories]
    table = cached_table(files, options, build) if storage == "shared" else build()
    if annotations_required and not table.annotated_shards.all():
        path = [path for paths in files for path in paths][int(np.argmin(table.annotated_shards))]
        hint = "add the list, empty if there are none"
        raise DataError(Problem("has no annotations", path, "annotations", hint=hint))
    return table


def _parse_file(path: Path, with_masks: bool) -> JsonColumns:
    with _mapped(path) as content:
        return parse_coco_json(content, path, with_masks=with_masks)


def class_names_of_files(sources: Sequence[CocoSource | Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The class names of each annotation file, without categories that are only a supercategory.

    Raises:
        DataError: a file is missing or is not COCO.
    """
    paths = [path for source in sources for path in CocoSource.of(source).files()]
    files = []
    for path in paths:
        with _mapped(path) as content:
            files.append((path, parse_categories(content, path)))
    out = left_out_categories(files)[0]
    return [
        tuple(name for number, name in item.names.items() if (number, name) not in out) for _, item in files
    ]


_SIZE_READERS = 16


def _with_sizes(source: CocoSource, part: ParsedSource) -> ParsedSource:
    """Fill in the sizes that the files lack, from the headers of the images.

    Raises:
        DataError: some of these images cannot be read.
    """
    missing = [np.flatnonzero((item.sizes_hw == 0).any(axis=1)) for item in part.columns]
    if not any(rows.size for rows in missing):
        return part
    check_file_names(part)
    columns, failures = [], []
    with ThreadPoolExecutor(_SIZE_READERS) as pool:
        for path, item, rows in zip(part.paths, part.columns, missing, strict=True):
            names = [source.image_path(item.file_names[row]) for row in rows.tolist()]
            for row, name, size in zip(rows.tolist(), names, pool.map(_size_or_fault, names), strict=True):
                if isinstance(size, str):
                    failures.append((path, f"images[{row}]", f"{name}: {size}"))
                else:
                    item.sizes_hw[row] = size
            examples = tuple(
                (f"images[{row}]", item.file_names[row]) for row in rows[:EXAMPLES_SHOWN].tolist()
            )
            what = "images without width and height: read from the image files"
            repairs = [Repair(what, int(rows.size), path, examples)] if rows.size else []
            columns.append(replace(item, repairs=[*item.repairs, *repairs]))
    if failures:
        what = "images without width and height, whose files cannot be read either"
        hint = "add width and height, or correct image_dir"
        raise DataError(refusal(what, len(failures), failures, hint))
    return replace(part, columns=tuple(columns))


def _size_or_fault(path: str) -> tuple[int, int] | str:
    """Height and width of an image, or why it cannot be read."""
    try:
        width, height = read_image_size(path)
    except UnreadableImage as error:
        return str(error)
    return height, width


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The content of a file, mapped into memory."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                yield memoryview(b"")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield view
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", path)) from error


@dataclass(frozen=True)
class SkippedFile:
    """A file that is not read as an image, and why."""

    path: Path
    reason: str


SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that macOS and Windows leave in folders of images; macOS also leaves ``._<name>`` beside a file."""


def list_images(
    folders: Sequence[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    suffixes: Sequence[str] = IMAGE_EXTENSIONS,
) -> list[Path]:
    """The image files of some folders, see :func:`find_images`.

    Raises:
        DataError: a folder does not exist, or none holds an image.
    """
    return find_images(folders, recursive=recursive, suffixes=suffixes)[0]


def find_images(
    folders: Sequence[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    suffixes: Sequence[str] = IMAGE_EXTENSIONS,
) -> tuple[list[Path], list[SkippedFile]]:
    """The image files of some folders: folders in the given order, files sorted by name.

    Args:
        folders: folders, or single image files.
        recursive: search subfolders too.
        suffixes: lower-case extensions of images; file names may be in any case.

    Returns:
        The images, and what is left out although it looks like one: system files, and folders, pipes and
        dead links with the name of an image.

    Raises:
        DataError: a folder does not exist, or none holds an image.
    """
    problems: list[Problem] = []
    found: list[Path] = []
    skipped: list[SkippedFile] = []
    for folder in map(Path, folders):
        if folder.is_file():
            found.append(folder)
        elif folder.is_dir():
            for item in sorted(folder.rglob("*") if recursive else folder.iterdir()):
                if item.name in SYSTEM_FILES or item.name.startswith("._"):
                    skipped.append(SkippedFile(item, "a file of the operating system"))
                elif item.suffix.lower() in suffixes:
                    if item.is_file():
                        found.append(item)
                    else:
                        skipped.append(SkippedFile(item, "no regular file"))
        else:
            problems.append(Problem("image folder does not exist", folder, hint="correct image_dir"))
    DataError.collect(problems)
    if not found:
        names = ", ".join(str(folder) for folder in folders) or "nothing"
        raise DataError(Problem("no image was found", names, allowed=suffixes))
    return list(dict.fromkeys(found)), list(dict.fromkeys(skipped))
