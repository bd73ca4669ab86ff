"""Read a weights file without running code from it.

PyTorch files (zip archives and the older bare pickles) go through ``torch.load(weights_only=True)`` with
inert replacements of known bookkeeping classes (:mod:`ddetr_mm.weights.pickle_names`), other pickles (such as
Detectron2's ``.pkl``) through an unpickler that knows these replacements only; safetensors files go through
the safetensors library, NumPy's ``.npz`` through NumPy without pickles; a folder is one saved by Hugging
Face's ``save_pretrained``.
Every defect of a file becomes a :class:`~ddetr_mm.errors.WeightsError`.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.files import parse_json
from ddetr_mm.weights.encryption import is_encrypted, plain_file
from ddetr_mm.weights.pickle_bounds import OutOfBounds, check_pickle
from ddetr_mm.weights.pickle_names import PlainUnpickler, SafeGlobal, names_in_pickle, sort_names
from ddetr_mm.weights.quantized import Quantization, plain_content

# --- Messages ---

ENCRYPTED = (
    "is encrypted by TAO's own, closed scheme and cannot be read here",
    "decrypt it with the tool that wrote it, or save it there without encryption_key",
)
"""Problem and hint for a file that TAO encrypted."""

_SAVE_PLAIN = (
    "loading never runs code from a file: save the state_dict alone (torch.save(model.state_dict(), path))"
    " where you trust it, or do not use this file"
)

_CONVERT_FROM_TORCH = "give the PyTorch checkpoint that it was made from"

_SUFFIXES: dict[str, tuple[str, str]] = {
    ".tlt": (f"is a .tlt file: it {ENCRYPTED[0]}", ENCRYPTED[1]),
    ".etlt": (
        "is an .etlt file, an export for TensorRT that is encrypted by TAO's own, closed scheme: it is no"
        " checkpoint",
        "give the .pth that it was exported from",
    ),
    ".onnx": (
        "is an ONNX model, not a file of weights",
        "evaluate.checkpoint and inference.checkpoint take it as it is; elsewhere " + _CONVERT_FROM_TORCH,
    ),
    **dict.fromkeys(
        (".engine", ".plan", ".trt"),
        (
            "is a TensorRT engine, not a file of weights",
            "evaluate.trt_engine and inference.trt_engine take it as it is; elsewhere " + _CONVERT_FROM_TORCH,
        ),
    ),
    ".pdparams": (
        "is PaddlePaddle's: its linear layers are transposed and its names differ",
        "convert it to PyTorch first",
    ),
    ".pb": ("is a TensorFlow graph, not a file of weights", _CONVERT_FROM_TORCH),
    ".tflite": ("is a TensorFlow Lite model, not a file of weights", _CONVERT_FROM_TORCH),
    ".msgpack": (
        "is a Flax checkpoint, which is not read",
        "save it in transformers as PyTorch or safetensors",
    ),
    ".distcp": (
        "is a part of a distributed checkpoint",
        "join it: torch.distributed.checkpoint.format_utils",
    ),
}
"""Kinds of files by their ending, for files that begin like none of ours: what they are, and a hint."""

_KERAS = (
    "is an HDF5 file (Keras, or a network of TAO's TensorFlow branch), which holds no Deformable DETR",
    "a backbone must be a PyTorch file: torchvision's or timm's, for example",
)

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a bitmap image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"\xfd7zXZ", "xz-compressed data"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x7fELF", "a program"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself has not been fetched"),
    (b"<!DOCTYPE", "a web page, perhaps an error page saved by a download"),
    (b"<html", "a web page, perhaps an error page saved by a download"),
)


def explain_start(path: Path, start: bytes) -> Problem:
    """Return the problem with a file that does not begin like a weights file.

    Args:
        path: the file.
        start: its first bytes, up to 512.
    """
    if start.startswith(b"\x89HDF"):
        return Problem(_KERAS[0], file=path, hint=_KERAS[1])
    if path.suffix.lower() in _SUFFIXES:
        return explain_suffix(path)
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return _not_weights(path, kind)
    if start[257:262] == b"ustar":
        return Problem(
            "is a tar archive (or PyTorch's oldest file format, which cannot be read safely)",
            file=path,
            hint="give the weights file itself; a file of that age must be saved again with a newer torch",
        )
    if _is_text(start):
        return _not_weights(path, "a JSON file" if start.lstrip()[:1] in (b"{", b"[") else "a text file")
    return Problem(
        "is neither a PyTorch nor a safetensors file; it may be damaged, or encrypted by TAO's"
        " own, closed scheme, which cannot be read here",
        file=path,
        hint="check where it comes from; what TAO encrypted must be saved there without encryption_key",
    )


def explain_suffix(path: Path) -> Problem:
    """Return the problem with a file whose ending names a kind that is not read."""
    what, hint = _SUFFIXES[path.suffix.lower()]
    return Problem(what, file=path, hint=hint)


def _not_weights(path: Path, kind: str) -> Problem:
    return Problem(
        f"is {kind}, not a file of weights",
        file=path,
        allowed=".pth, .pt, .bin, .ckpt, .pkl, .npz, .safetensors or a Hugging Face folder",
        hint="check the path",
    )


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut in two by the end of the sample.
        if error.start < len(start) - 4:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


def short_names(names: Sequence[str], shown: int = 4) -> str:
    """Return the first names of a list, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


# --- Reading ---

_MAX_PICKLE_BYTES = 256 * 2**20
_MAX_JSON_BYTES = 64 * 2**20
_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save's number at the start of its older files
_PICKLES_IN_OLD_FILE = 5  # magic number, protocol, system, the object, the storages' keys
_AGAIN = "copy or download it again"
_DAMAGE = (ValueError, IndexError, OverflowError, EOFError, struct.error)
"""What pickletools raises on bytes that are not a pickle."""


@dataclass
class RawFile:
    """The content of a file.

    Attributes:
        path: the file or folder.
        kind: ``torch``, ``pickle``, ``numpy``, ``safetensors`` or ``hf_folder``.
        payload: the unpickled object of a PyTorch file or pickle, else key → tensor.
        metadata: text metadata of a safetensors file.
        config: ``config.json`` of a Hugging Face folder, also where its weights file was given.
        preprocessor: ``preprocessor_config.json`` of that folder, where it has one.
        quantization: how torchao or ModelOpt quantized the weights, which are plain in ``payload``.
    """

    path: Path
    kind: str
    payload: Any
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None


def read_raw(path: str | Path) -> RawFile:
    """Read a file or folder of weights.

    Args:
        path: a PyTorch file, a pickle of NumPy arrays, an ``.npz`` or safetensors file or a Hugging Face
            folder; a file may be encrypted by this package (:mod:`ddetr_mm.weights.encryption`).

    Raises:
        WeightsError: it is missing, damaged, of another kind, or would run code; or it is encrypted and the
            process has no key or the wrong one.
    """
    if "://" in str(path):
        raise WeightsError(Problem("is a URL", file=path, hint="download it, and name the file"))
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        _refuse(path, "does not exist", "check the path")
    size = path.stat().st_size
    if size == 0:
        _refuse(path, "is empty (0 bytes)", _AGAIN)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}", "check its permissions", error)
    if is_encrypted(path):
        with plain_file(path) as plain:
            return replace(read_raw(plain), path=path, config=_config_beside(path))
    if path.suffix.lower() == ".pdparams":
        raise WeightsError(explain_suffix(path))
    if start.startswith(b"PK\x03\x04"):
        arrays = _read_npz(path, size)
        if arrays is not None:
            return RawFile(path, "numpy", arrays)
        content, quantization = plain_content(_read_torch_zip(path, size), path)
        return RawFile(path, "torch", content, config=_config_beside(path), quantization=quantization)
    if path.suffix == ".safetensors" or _looks_like_safetensors(start, size):
        tensors, metadata = read_safetensors(path)
        return RawFile(path, "safetensors", tensors, metadata, _config_beside(path))
    if start.startswith(b"\x80"):
        if _MAGIC not in start[:64]:
            return RawFile(path, "pickle", _read_plain_pickle(path))
        return RawFile(path, "torch", _read_torch_pickle(path))
    raise WeightsError(explain_start(path, start))


def _refuse(path: Path, what: str, hint: str, cause: BaseException | None = None) -> NoReturn:
    raise WeightsError(Problem(what, file=path, hint=hint)) from cause


# --- PyTorch files ---


def _read_torch_zip(path: Path, size: int) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _data_pickle(path, archive, size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, *_DAMAGE) as error:
        _refuse(path, "is truncated or damaged: its zip directory cannot be followed", _AGAIN, error)
    # Memory-mapped storages cannot reach outside the file, for any sizes that the pickle claims.
    return _load(path, _names(path, pickled), mmap=True)


def _data_pickle(path: Path, archive: zipfile.ZipFile, size: int) -> bytes:
    """Return the pickle inside a PyTorch zip archive, after checks of the archive."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any("/code/" in name for name in names):
        _refuse(
            path,
            "is a TorchScript program, not a file of weights",
            "save the state_dict of the model it was made from",
        )
    if any(
        name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in names
    ):
        _refuse(path, "is a program of torch.export, not a file of weights", _CONVERT_FROM_TORCH)
    if any(name.endswith("model.weights.h5") for name in names):
        _refuse(path, "is a Keras archive, which holds no Deformable DETR", _KERAS[1])
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        _refuse(
            path,
            f"holds compressed data ({packed[0].filename}, {packed[0].compress_size} bytes for"
            f" {packed[0].file_size}), which torch.save never writes",
            "unpack the archive if the weights file is inside it; otherwise do not trust it",
        )
    if sum(entry.file_size for entry in entries) > size:
        _refuse(path, "claims more content than it has bytes", "do not trust it")
    inside = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if not inside:
        if path.suffix.lower() in _SUFFIXES:
            raise WeightsError(explain_suffix(path))
        shown = ", ".join(names[:4]) or "nothing"
        what = f"is a zip archive but not a PyTorch file (it holds {shown})"
        _refuse(path, what, "give the weights file itself")
    entry = archive.getinfo(inside[0])
    if entry.file_size > _MAX_PICKLE_BYTES:
        _refuse(
            path, f"has an index of {entry.file_size} bytes, which no model needs", "do not trust this file"
        )
    try:
        return archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        _refuse(path, f"is damaged: {error}", _AGAIN, error)


def _check_bounds(path: Path, pickled: Any) -> None:
    """Refuse a pickle whose objects would be too deep or too large; a file is read on from its position.

    Raises:
        WeightsError: see :mod:`ddetr_mm.weights.pickle_bounds`.
        ValueError: or another of ``_DAMAGE``: it is incomplete.
    """
    try:
        check_pickle(pickled)
    except OutOfBounds as error:
        _refuse(path, f"{error}, which no file of weights does", "do not trust this file", error)


def _names(path: Path, pickled: bytes) -> list[str]:
    try:
        _check_bounds(path, pickled)
        return names_in_pickle(pickled)
    except _DAMAGE as error:
        _refuse(path, f"is damaged: its index cannot be read ({error})", _AGAIN, error)


def _read_torch_pickle(path: Path) -> Any:
    """Read a file of torch.save before zip archives: several pickles, then raw storages."""
    names: list[str] = []
    with path.open("rb") as file:
        for number in range(_PICKLES_IN_OLD_FILE):
            start = file.tell()
            try:
                _check_bounds(path, file)
                file.seek(start)
                names += names_in_pickle(file)
            except _DAMAGE as error:
                if number == 0:
                    _refuse(path, f"is no whole PyTorch file ({error})", _AGAIN, error)
                break  # fewer pickles than torch.save writes: torch.load below reports what is missing
    return _load(path, names, mmap=False)


def _load(path: Path, names: list[str], *, mmap: bool) -> Any:
    offered, refused = sort_names(dict.fromkeys(names))
    if refused:
        _refuse_names(path, refused)
    try:
        with warnings.catch_warnings(), _only_allowed(offered):
            # torch warns of other pickle protocols; such files load or fail here.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        # Damaged bytes cause nearly any of Python's errors.
        text = _first_line(str(error))
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" not in text:
            _refuse(path, f"is not a plain file of weights: {text}", _SAVE_PLAIN, error)
        what = f"is truncated, damaged or not a PyTorch file: {type(error).__name__}: {text}"
        _refuse(path, what, _AGAIN, error)


def _refuse_names(path: Path, refused: Sequence[str]) -> NoReturn:
    """Refuse a file by the names of what it would build or run."""
    shown = short_names(refused)
    if any(name.startswith("torch.jit.") for name in refused):
        _refuse(path, f"is a TorchScript program inside a pickle ({shown})", _SAVE_PLAIN)
    if any(name.startswith("torch.nn.modules.") for name in refused):
        of = " of Ultralytics" if any(name.startswith("ultralytics.") for name in refused) else ""
        what = f"is a whole pickled model{of}, not its weights: it asks to build {shown}"
        _refuse(path, what, _SAVE_PLAIN)
    _refuse(path, f"asks to run or build {shown}", _SAVE_PLAIN)


def _read_plain_pickle(path: Path) -> Any:
    """Read a pickle that torch.save did not write, such as Detectron2's arrays."""
    with path.open("rb") as file:
        unpickler = PlainUnpickler(file)
        try:
            _check_bounds(path, file)
            file.seek(0)
            return unpickler.load()
        except WeightsError:
            raise
        except Exception as error:
            # Damaged bytes cause nearly any of Python's errors.
            if unpickler.refused and unpickler.refused.startswith("torch."):
                _refuse(path, "is a pickle of tensors that torch.save did not write", _SAVE_PLAIN, error)
            if unpickler.refused:
                _refuse_names(path, [unpickler.refused])
            if isinstance(error, pickle.UnpicklingError) and "asks for" in str(error):
                _refuse(path, _first_line(str(error)), _SAVE_PLAIN, error)
            text = f"{type(error).__name__}: {_first_line(str(error))}"
            _refuse(path, f"is no whole PyTorch file and no whole pickle ({text})", _AGAIN, error)


# --- NumPy archives ---

_MAX_INFLATION = 100  # weights hardly shrink; an archive that grows more is a zip bomb


def _read_npz(path: Path, size: int) -> dict[str, Tensor] | None:
    """Return the arrays of an ``.npz`` archive as tensors, or None where the zip archive is another one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, *_DAMAGE):
        return None  # the reader of PyTorch archives says what is wrong
    if not entries or not all(entry.filename.endswith(".npy") for entry in entries):
        return None
    if sum(entry.file_size for entry in entries) > max(_MAX_INFLATION * size, 2**20):
        _refuse(path, "claims more content than its bytes can hold", "do not trust it")
    tensors: dict[str, Tensor] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                array = arrays[key]
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                tensors[key] = torch.from_numpy(np.ascontiguousarray(native))
    except ValueError as error:
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            _refuse(path, "holds Python objects, not arrays", "save one array a name with numpy.savez", error)
        _refuse(path, f"is no whole .npz archive: {_first_line(str(error))}", _AGAIN, error)
    except TypeError as error:
        _refuse(path, f"holds arrays of no numbers: {_first_line(str(error))}", "save numbers alone", error)
    except (zipfile.BadZipFile, zlib.error, OSError, MemoryError, *_DAMAGE) as error:
        _refuse(path, f"is no whole .npz archive: {_first_line(str(error))}", _AGAIN, error)
    return tensors


@contextmanager
def _only_allowed(offered: Sequence[SafeGlobal]) -> Iterator[None]:
    """Allow these names beside torch's own, and no others that were allowed for the whole process.

    With both a real class and its replacement under one name, either might be used.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(offered))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _first_line(text: str, limit: int = 200) -> str:
    for line in text.splitlines():
        if line.strip():
            return line.strip()[:limit]
    return "no reason given"


# --- safetensors ---


def _looks_like_safetensors(start: bytes, size: int) -> bool:
    if len(start) < 10:
        return False
    (length,) = struct.unpack("<Q", start[:8])
    return bool(start[8:9] == b"{" and length <= size - 8)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and text metadata of a safetensors file.

    Raises:
        WeightsError: the header is too large, damaged, or claims more data than the file has.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and struct.unpack("<Q", start)[0] > size - 8:
        _refuse(
            path,
            f"is truncated or no safetensors file: its header claims {struct.unpack('<Q', start)[0]} bytes"
            f" in a file of {size}",
            _AGAIN,
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        _refuse(path, f"is no whole safetensors file: {_first_line(str(error))}", _AGAIN, error)


# --- Hugging Face folders ---


def _read_folder(folder: Path) -> RawFile:
    kind = _other_folder(folder)
    if kind is not None:
        _refuse(folder, *kind)
    config_path = folder / "config.json"
    weights = [
        name
        for name in (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
        if (folder / name).is_file()
    ]
    if not config_path.is_file() or not weights:
        _refuse(
            folder,
            "is a folder without " + ("config.json" if not config_path.is_file() else "model.safetensors"),
            "give a weights file, or a folder saved by Hugging Face's save_pretrained",
        )
    config = _read_json(config_path)
    first = folder / weights[0]
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in [first] if first.suffix != ".json" else _shards(first):
        part, about = _read_part(file)
        tensors.update(part)
        metadata.update(about)
    preprocessor = folder / "preprocessor_config.json"
    described = _read_json(preprocessor) if preprocessor.is_file() else {}
    return RawFile(folder, "hf_folder", tensors, metadata, config, described)


def _other_folder(folder: Path) -> tuple[str, str] | None:
    """Return what a folder of another kind is, and a hint."""
    if (folder / ".metadata").is_file() or next(folder.glob("*.distcp"), None):
        hint = "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        return "is a distributed checkpoint of torch, in one part a process", hint
    if (folder / "zero_to_fp32.py").is_file():
        return "is a checkpoint of DeepSpeed, in one part a process", "join it with its zero_to_fp32.py"
    if (folder / "saved_model.pb").is_file():
        return "is a model saved by TensorFlow", _CONVERT_FROM_TORCH
    return None


def _config_beside(path: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face folder whose weights file was given instead of the folder."""
    config_path = path.with_name("config.json")
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not config_path.is_file():
        return {}
    config = _read_json(config_path)
    return config if config.get("model_type") == "deformable_detr" else {}


def _shards(index_path: Path) -> list[Path]:
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index_path, "has no weight_map", "save the model again with save_pretrained")
    files = []
    for name in dict.fromkeys(str(value) for value in weight_map.values()):
        # A shard's name must not lead out of the folder.
        if Path(name).name != name:
            _refuse(index_path, f"names a shard outside its folder: {name}", "do not trust this folder")
        files.append(index_path.with_name(name))
    return files


def _read_part(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        _refuse(file, "is missing: the index names it", "copy or download the whole folder")
    raw = read_raw(file)
    if not isinstance(raw.payload, dict):
        _refuse(file, f"holds a {type(raw.payload).__name__}, not named tensors", "save the model again")
    return dict(raw.payload), raw.metadata


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        _refuse(path, "is too large for a JSON description", "do not trust this folder")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse(path, f"is not JSON: {error}", "save the model again with save_pretrained", error)
    if not isinstance(content, dict):
        _refuse(path, "is not a JSON object", "save the model again with save_pretrained")
    return content


def refuse_encrypted(path: Path) -> NoReturn:
    """Raise the error for files that TAO encrypted."""
    _refuse(path, *ENCRYPTED)
