"""The sequence folders of a conversion, and the images and label files in them.

A sequence has a folder of images and one of labels, with the same names. Everything written about it uses the
sequence's *name*, a relative path that never leads out of its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.datasets.image_size import IMAGE_EXTENSIONS
from ddetr_mm.errors import DataError, Problem

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

    Blank lines and lines that begin with ``#`` are skipped.

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
            Problem(fault, file=input_source, where=where, value=str(folder), hint=_folder_hint(data_root))
            for fault, folder in faults
        )
        sequences.append(sequence)
    DataError.collect(problems)
    return sequences


def _folder_hint(data_root: Path | None) -> str:
    root = "data_root is not set, so lines are relative to the current folder"
    if data_root is not None:
        root = f"lines are relative to data_root {str(data_root)!r}"
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


def image_names(sequence: KittiSequence, image_extension: str | None) -> tuple[list[str], list[str]]:
    """File names of a sequence's images, sorted by their bytes.

    Args:
        sequence: where to look.
        image_extension: the only extension that counts, in this case; None: every common image type.

    Returns:
        The images, and those left out because an image of the same name but another type comes before them
        (``a.jpg`` before ``a.png``: both would use the label ``a.txt``). Hidden files are no images.
    """
    found = os.listdir(os.fsencode(sequence.image_dir))
    if image_extension is not None:
        ending = os.fsencode(image_extension)
        return _sorted_names(name for name in found if _has_ending(name, ending)), []
    endings = {name: name[name.rfind(b".") :] for name in found if not name.startswith(b".")}
    images = {name: ending for name, ending in endings.items() if ending.lower() in _IMAGE_ENDINGS}
    names = _sorted_names(images)
    if len(set(images.values())) <= 1:  # then no two names differ in it alone
        return names, []
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(image_stem(name, None), name)
    kept = list(first.values())
    return kept, [name for name in names if first[image_stem(name, None)] != name]


def count_labels(sequence: KittiSequence) -> int:
    """Number of label files of a sequence."""
    return sum(_has_ending(name, _LABEL_ENDING) for name in os.listdir(os.fsencode(sequence.label_dir)))


def labels_without_image(
    sequence: KittiSequence, images: Iterable[str], image_extension: str | None
) -> list[str]:
    """Label files that no image belongs to, sorted.

    Args:
        sequence: where to look.
        images: its images.
        image_extension: as in :func:`image_names`.
    """
    used = {image_stem(name, image_extension) + LABEL_EXTENSION for name in images}
    found = os.listdir(os.fsencode(sequence.label_dir))
    labels = _sorted_names(name for name in found if _has_ending(name, _LABEL_ENDING))
    return [name for name in labels if name not in used]


def _sorted_names(names: Iterable[bytes]) -> list[str]:
    return [os.fsdecode(name) for name in sorted(names)]


def _has_ending(name: bytes, ending: bytes) -> bool:
    return name.endswith(ending) and name != ending and not name.startswith(b".")
