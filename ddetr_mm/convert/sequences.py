"""The sequence folders of a conversion: images and label files by name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddetr_mm.datasets.image_size import IMAGE_EXTENSIONS
from ddetr_mm.errors import DataError, Problem

# --- File names of a folder in a few bytes each, for folders of millions of files ---

_NAMES_AT_ONCE = 2**16


class NameList:
    """Names in one array of bytes: about as many bytes a name as the longest one has characters.

    Args:
        names: ``(n,)`` array of fixed-width bytes (file names hold no NUL, which such arrays drop).
    """

    def __init__(self, names: NDArray[np.bytes_]) -> None:
        self._names = names

    @classmethod
    def of(cls, names: Iterable[bytes]) -> NameList:
        """Collect names; they may come from a generator."""
        iterator = iter(names)
        parts: list[NDArray[np.bytes_]] = []
        while batch := list(itertools.islice(iterator, _NAMES_AT_ONCE)):
            parts.append(np.array(batch, dtype=np.bytes_))
        return cls(np.concatenate(parts) if parts else np.zeros(0, dtype="S1"))

    @classmethod
    def of_folder(cls, folder: Path, wanted: Callable[[bytes], bool]) -> NameList:
        """The sorted names in a folder that are ``wanted``."""
        with os.scandir(os.fsencode(folder)) as entries:
            found = cls.of(name for name in (entry.name for entry in entries) if wanted(name))
        found._names.sort()
        return found

    def __len__(self) -> int:
        return len(self._names)

    def part(self, start: int, stop: int) -> list[str]:
        """The names from ``start`` up to ``stop``."""
        return [os.fsdecode(name) for name in self._names[start:stop].tolist()]

    def take(self, which: NDArray[Any]) -> NameList:
        """The names at these positions, or where this mask is true."""
        return NameList(self._names[which])

    def map(self, function: Callable[[bytes], bytes]) -> NameList:
        """``function`` of every name, in the same order."""
        starts = range(0, len(self), _NAMES_AT_ONCE)
        batches = (self._names[start : start + _NAMES_AT_ONCE].tolist() for start in starts)
        return NameList.of(function(name) for batch in batches for name in batch)

    def first_of_each(self) -> NDArray[np.bool_]:
        """``(n,)`` mask: False where the same name stands further up."""
        mask = np.zeros(len(self), dtype=bool)
        mask[np.unique(self._names, return_index=True)[1]] = True
        return mask

    def missing_in(self, other: NameList) -> NDArray[np.bool_]:
        """``(n,)`` mask: True for names that ``other`` does not have."""
        return ~np.isin(self._names, other._names)


# --- The sequences of a KITTI-style dataset: one folder each, with images and labels of the same names ---
# Everything that is written about a sequence uses its *name*, a relative path that never climbs out of
# the folder it is relative to.

LABEL_EXTENSION = ".txt"
_LABEL_ENDING = LABEL_EXTENSION.encode()
_IMAGE_ENDINGS = frozenset(ending.encode() for ending in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class KittiSequence:
    """One folder of images with one folder of labels.

    Attributes:
        name: the sequence in the output: relative, with ``/``, without ``..``.
        image_root: folder that ``<name>/<image folder>/<file>`` is relative to.
        image_dir: folder of the images.
        label_dir: folder of the labels.
        image_prefix: what goes before an image's file name in the output, with a final ``/``.
        label_prefix: the same for labels.
    """

    name: str
    image_root: Path
    image_dir: Path
    label_dir: Path
    image_prefix: str
    label_prefix: str


def read_sequences(
    input_source: Path, data_root: Path | None, image_dir_name: str | None, label_dir_name: str | None
) -> list[KittiSequence]:
    """The sequences that a text file lists, one folder a line.

    Blank lines and lines that begin with ``#`` are passed over.

    Args:
        input_source: the text file.
        data_root: folder the lines are relative to; the current folder when None.
        image_dir_name: folder of the images inside a sequence; None: the sequence folder itself.
        label_dir_name: the same for labels.

    Raises:
        DataError: the file cannot be read or lists nothing; a folder does not exist or cannot be read; two
            lines are the same sequence or would get the same name; a name leads out of its folder. All
            faults are shown at once.
    """
    names = {
        "image_dir_name": _inner_folder(image_dir_name, "image_dir_name"),
        "label_dir_name": _inner_folder(label_dir_name, "label_dir_name"),
    }
    problems: list[Problem] = []
    sequences: list[KittiSequence] = []
    line_of_name: dict[str, int] = {}
    for number, line in _listed_folders(input_source):
        where = f"line {number}"
        try:
            name, image_root = _name_and_root(line, data_root)
        except ValueError as error:
            problems.append(Problem(str(error), file=input_source, where=where, value=line))
            continue
        if name in line_of_name:
            problems.append(
                Problem(
                    f"is the same sequence as line {line_of_name[name]} or has the same name {name!r}",
                    file=input_source,
                    where=where,
                    value=line,
                    hint="list every sequence once; where two folders share their last name, list them "
                    "relative to a common data_root",
                )
            )
            continue
        line_of_name[name] = number
        sequence = _sequence(name, image_root, names["image_dir_name"], names["label_dir_name"])
        faults = _missing_folders(sequence)
        problems.extend(
            Problem(fault, file=input_source, where=where, value=str(folder), hint=_mend(data_root))
            for fault, folder in faults
        )
        sequences.append(sequence)
    DataError.collect(problems)
    return sequences


def _mend(data_root: Path | None) -> str:
    root = (
        "data_root is not set, so lines are relative to the current folder"
        if data_root is None
        else (f"lines are relative to data_root {str(data_root)!r}")
    )
    return f"check the line, image_dir_name and label_dir_name ({root})"


def _listed_folders(input_source: Path) -> list[tuple[int, str]]:
    try:
        text = input_source.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            Problem(
                f"the list of sequences cannot be read: {error.strerror}",
                file=input_source,
                hint="check input_source",
            )
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("the list of sequences is not UTF-8 text", file=input_source, where=f"byte {error.start}")
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(
            Problem("lists no sequence", file=input_source, allowed="one sequence folder a line, e.g. train")
        )
    return lines


def _inner_folder(name: str | None, field: str) -> str:
    """``name`` as a normal relative path, "" for the folder itself."""
    path = os.path.normpath(name) if name else "."
    if os.path.isabs(path) or path.split(os.sep)[0] == "..":
        raise DataError(
            Problem(
                "leads out of the sequence folder",
                where=field,
                value=name,
                allowed="a folder inside each sequence",
            )
        )
    return "" if path == "." else path


def _name_and_root(line: str, data_root: Path | None) -> tuple[str, Path]:
    """Name of the sequence that a line lists, and the folder which that name is relative to.

    Raises:
        ValueError: no name can be given.
    """
    root = Path(os.path.abspath(data_root or "."))
    folder = os.path.abspath(os.path.join(root, line))
    inside = os.path.relpath(folder, root)
    climbs_out = inside.split(os.sep)[0] == ".."
    if data_root is not None and climbs_out and not os.path.isabs(line):
        raise ValueError("leads out of data_root")
    if climbs_out or inside == "." or (data_root is None and os.path.isabs(line)):
        name = os.path.basename(folder)
        if not name:
            raise ValueError("is no folder with a name")
        return name, Path(folder).parent
    return Path(inside).as_posix(), root


def _sequence(name: str, image_root: Path, image_folder: str, label_folder: str) -> KittiSequence:
    folder = image_root / name
    return KittiSequence(
        name=name,
        image_root=image_root,
        image_dir=folder / image_folder,
        label_dir=folder / label_folder,
        image_prefix=f"{Path(name, image_folder).as_posix()}/",
        label_prefix=f"{Path(name, label_folder).as_posix()}/",
    )


def _missing_folders(sequence: KittiSequence) -> list[tuple[str, Path]]:
    faults: list[tuple[str, Path]] = []
    for folder in dict.fromkeys(
        (sequence.image_root / sequence.name, sequence.image_dir, sequence.label_dir)
    ):
        try:
            with os.scandir(folder):
                continue
        except FileNotFoundError:
            faults.append(("the folder does not exist", folder))
        except OSError as error:
            faults.append((f"the folder cannot be read: {error.strerror}", folder))
        break
    return faults


def image_stem(file_name: str, image_extension: str | None) -> str:
    """The name an image shares with its label file."""
    if image_extension is not None:
        return file_name[: -len(image_extension)]
    return file_name.rpartition(".")[0]


def list_images(sequence: KittiSequence, image_extension: str | None) -> tuple[NameList, NameList]:
    """File names of the sequence's images in alphabetical order (of their bytes).

    Args:
        sequence: where to look.
        image_extension: the only ending that counts, case and all; None: every common image type.

    Returns:
        The images, and those left out because an image of the same name but another type comes before
        them (``a.jpg`` before ``a.png``: both would use the label ``a.txt``). Hidden files are no images.
    """
    if image_extension is not None:
        ending = os.fsencode(image_extension)
        return NameList.of_folder(sequence.image_dir, lambda name: _has_ending(name, ending)), NameList.of(())
    endings: set[bytes] = set()

    def is_image(name: bytes) -> bool:
        ending = name[name.rfind(b".") :]
        if name.startswith(b".") or ending.lower() not in _IMAGE_ENDINGS:
            return False
        endings.add(ending)
        return True

    names = NameList.of_folder(sequence.image_dir, is_image)
    if len(endings) <= 1:  # then no two names can differ in it alone
        return names, NameList.of(())
    first = names.map(lambda name: name.rpartition(b".")[0]).first_of_each()
    return names.take(first), names.take(~first)


def count_labels(sequence: KittiSequence) -> int:
    """How many label files the sequence has."""
    with os.scandir(os.fsencode(sequence.label_dir)) as entries:
        return sum(_has_ending(entry.name, _LABEL_ENDING) for entry in entries)


def labels_without_image(sequence: KittiSequence, images: NameList, image_extension: str | None) -> list[str]:
    """Label files that no image belongs to, in alphabetical order.

    Args:
        sequence: where to look.
        images: its images.
        image_extension: as in :func:`list_images`.
    """
    labels = NameList.of_folder(sequence.label_dir, lambda name: _has_ending(name, _LABEL_ENDING))
    stems = images.map(lambda name: os.fsencode(image_stem(os.fsdecode(name), image_extension)))
    orphans = labels.take(labels.map(lambda name: name[: -len(_LABEL_ENDING)]).missing_in(stems))
    return orphans.part(0, len(orphans))


def _has_ending(name: bytes, ending: bytes) -> bool:
    return name.endswith(ending) and name != ending and not name.startswith(b".")
