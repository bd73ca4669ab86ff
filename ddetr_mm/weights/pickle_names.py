"""The classes and functions that a pickle names, and their inert replacements.

``torch.load(weights_only=True)`` refuses every global that it does not know, also the harmless containers
that Lightning and mmengine store beside the weights. Nothing that a file names is imported or called here:

- the names are listed with :mod:`pickletools`, which only reads;
- names that torch allows (tensors, storages, OrderedDict) are left to torch;
- names of known bookkeeping classes are bound to inert classes of ours, which keep their arguments;
- a file with any other name is refused, and the message has the name.

The list of names only decides which replacements are offered. What may run is decided by torch's weights-only
unpickler, which looks names up in its own table and in ours.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddetr_mm.weights.quantized import PlainQuantizedTensor

SafeGlobal: TypeAlias = "Callable[..., Any] | tuple[Callable[..., Any], str]"


class InertObject:
    """Replaces an object of a bookkeeping class: keeps its arguments and state, does nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> InertObject:
        """Create an empty object for any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **_options: Any) -> None:
        self.arguments = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state


class InertDict:
    """Replaces a dictionary class; calling it returns an ordered dictionary."""

    def __new__(cls, *_args: Any, **_options: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """Return an empty dictionary, which the unpickler fills."""
        return OrderedDict()


class InertList:
    """Replaces a list class; calling it returns a list."""

    def __new__(cls, *_args: Any, **_options: Any) -> list[Any]:  # type: ignore[misc]
        """Return an empty list, which the unpickler fills."""
        return []


class InertHistory(InertObject):
    """Replaces mmengine's HistoryBuffer."""


class InertMethod(InertObject):
    """Replaces the methods of HistoryBuffer that mmengine pickles as ``getattr(HistoryBuffer, name)``."""

    def __new__(cls, owner: Any = None, name: Any = None, *_rest: Any, **_options: Any) -> InertMethod:
        """Create a replacement for a statistics method of a history, and refuse any other attribute.

        Raises:
            pickle.UnpicklingError: the object or the attribute is another one.
        """
        if owner is not InertHistory or name not in ("min", "max", "current", "mean"):
            raise pickle.UnpicklingError(f"asks for attribute {name!r} of {owner!r} by builtins.getattr")
        return object.__new__(cls)


class InertDtype(InertObject):
    """Replaces NumPy's dtype and the classes of :mod:`numpy.dtypes`: keeps its code and byte order."""

    def name(self) -> str | None:
        """Return NumPy's short name, such as ``<f4``; None for anything but plain numbers."""
        code = str(self.arguments[0]) if self.arguments else ""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        if not re.fullmatch(r"[fiub][1248]", code) or order not in ("<", ">", "=", "|"):
            return None
        return f"{order}{code}"


class InertArray(InertObject):
    """Replaces ``numpy``'s ``_reconstruct``: an array whose state is kept as it is in the file."""

    def tensor(self) -> Tensor | None:
        """Return the array as a tensor; None for an array of no plain numbers.

        Raises:
            ValueError: the bytes do not make the shape.
        """
        state = self.state
        if not isinstance(state, tuple) or len(state) != 5:
            return None
        _version, shape, dtype, is_fortran, data = state
        name = dtype.name() if isinstance(dtype, InertDtype) else None
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode("latin-1")
        sizes_fit = isinstance(shape, tuple) and all(isinstance(side, int) and side >= 0 for side in shape)
        if name is None or not sizes_fit or not isinstance(data, (bytes, bytearray)):
            return None
        order: Literal["F", "C"] = "F" if is_fortran else "C"
        array = np.frombuffer(bytes(data), dtype=np.dtype(name)).reshape(shape, order=order)
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


class InertBuffer(InertArray):
    """Replaces ``numpy``'s ``_frombuffer``, by which arrays are pickled since protocol 5."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if len(args) == 4:
            data, dtype, shape, order = args
            self.state = (1, shape, dtype, order == "F", data)


def latin_1_bytes(text: Any, encoding: Any) -> bytes:
    """Replace ``_codecs.encode``, by which pickles of protocol 2 hold bytes.

    Raises:
        pickle.UnpicklingError: it is asked for anything else.
    """
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"asks for _codecs.encode with {encoding!r}")
    return text.encode("latin-1")


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles that torch.save did not write: plain containers and NumPy arrays, everything else inert.

    Attributes:
        refused: the class or function that ended the reading, or None.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.refused: str | None = None

    def find_class(self, module: str, name: str) -> Any:
        """Return the inert replacement of a name; nothing is imported.

        Raises:
            pickle.UnpicklingError: the name has none.
        """
        full = _modern(module, name)
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "_codecs.encode":
            return latin_1_bytes
        replacement = replacement_for(full)
        if replacement is None:
            self.refused = full
            raise pickle.UnpicklingError(f"asks to run or build {full}")
        return replacement


_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_LIGHTNING = r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities)"
_CLASS_NAME = r"_?[A-Z]\w*"

_REPLACEMENTS: tuple[tuple[str, type], ...] = (
    # Lightning: hyper parameters, loop and callback states.
    (rf"{_LIGHTNING}(\.\w+)*\.AttributeDict", InertDict),
    (rf"{_LIGHTNING}(\.\w+)*\.{_CLASS_NAME}", InertObject),
    # Configurations as hyper parameters.
    (rf"omegaconf(\.\w+)*\.{_CLASS_NAME}", InertObject),
    (rf"nvidia_tao_(pytorch|core)(\.\w+)*\.{_CLASS_NAME}", InertObject),
    (rf"(addict\.addict|mmengine\.config\.config|mmcv\.utils\.config)\.{_CLASS_NAME}", InertDict),
    (rf"(yacs\.config|easydict)\.{_CLASS_NAME}", InertDict),
    # mmengine: histories of logged values, and NumPy numbers inside them.
    (re.escape(_HISTORY), InertHistory),
    (rf"mmengine\.(logging|structures|registry|dataset)(\.\w+)*\.{_CLASS_NAME}", InertObject),
    (r"numpy\.(core|_core)\.multiarray\._reconstruct", InertArray),
    (r"numpy\.(core|_core)\.numeric\._frombuffer", InertBuffer),
    (r"numpy\.(core|_core)\.multiarray\.scalar", InertObject),
    (rf"numpy\.(dtype|dtypes\.{_CLASS_NAME})", InertDtype),
    (r"numpy\.(ndarray|bool_?|u?int(8|16|32|64)|float(16|32|64))", InertObject),
    # The standard library's containers and values.
    (r"argparse\.Namespace", InertObject),
    (r"types\.SimpleNamespace", InertObject),
    (r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path", InertObject),
    (r"datetime\.(datetime|date|time|timedelta|timezone)", InertObject),
    (r"collections\.(defaultdict|ChainMap)", InertDict),
    (r"collections\.deque", InertList),
    (rf"typing\.{_CLASS_NAME}", InertObject),
    (r"uuid\.UUID", InertObject),
    (r"decimal\.Decimal", InertObject),
    (r"_io\.BytesIO", InertObject),
    # torchao's quantized tensors: their parts alone, see ddetr_mm.weights.quantized.
    (r"torchao\.quantization(\.\w+)*\.(Int8Tensor|Float8Tensor)", PlainQuantizedTensor),
    (r"torchao\.quantization(\.\w+)*\.KernelPreference", InertObject),
    # Built-in types as values (the type argument of a defaultdict, a field's type …): replaced, never called.
    (r"builtins\.(int|float|str|bool|list|dict|tuple|frozenset|bytes|object)", InertObject),
)

# Parts of tensors, which torch's weights-only unpickler may allow by itself.
_TORCH_OWN = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.(storage\.)?\w*Storage|torch\.(cuda\.)?\w*Tensor|torch\.(Size|device)|torch\.nn\.parameter\.Parameter"
    r"|torch\.(bool|half|float|double|short|int|long|[a-z]\w*\d\w*|per_\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)

_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in _REPLACEMENTS)


def replacement_for(name: str) -> type | None:
    """Return the inert replacement of a known bookkeeping class, or None for any other name.

    Args:
        name: dotted name, module first.
    """
    for pattern, replacement in _COMPILED:
        if pattern.fullmatch(name):
            return replacement
    return None


def names_in_pickle(pickled: bytes | BinaryIO) -> list[str]:
    """Return the dotted names of every class and function that a pickle names, in order, without running it.

    Args:
        pickled: a pickle, or a file at the start of one, which is read to its end.

    Raises:
        ValueError: the pickle is incomplete. Damaged bytes may raise other errors of :mod:`pickletools`
            (IndexError, OverflowError, UnicodeDecodeError).
    """
    names: dict[str, None] = {}
    strings: list[str] = []
    for opcode, argument, _position in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            names[_modern(module, name)] = None
        elif opcode.name == "STACK_GLOBAL":
            # Protocol 4 takes module and name from the stack: usually the two last strings.
            names[".".join(strings[-2:]) or "a name put together at run time"] = None
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            names[f"extension registry entry {argument}"] = None
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            strings = [*strings[-1:], argument]
    return list(names)


def _modern(module: str, name: str) -> str:
    """Return a name of Python 3: pickles of protocol 2 have those of Python 2 (``__builtin__ long``)."""
    renamed = _compat_pickle.NAME_MAPPING.get((module, name))
    if renamed is None:
        renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    return ".".join(renamed)


def sort_names(
    names: Iterable[str],
) -> tuple[list[SafeGlobal], list[str]]:
    """Sort the names of a file into replaced and refused ones.

    Args:
        names: dotted names.

    Returns:
        ``(replacement, name)`` pairs for :func:`torch.serialization.add_safe_globals`, and the refused names.
    """
    names = list(names)
    offered: list[SafeGlobal] = []
    refused: list[str] = []
    for name in names:
        if _TORCH_OWN.fullmatch(name):
            continue
        replacement = replacement_for(name)
        if name == "builtins.getattr" and _HISTORY in names:
            replacement = InertMethod
        if replacement is None:
            refused.append(name)
        else:
            offered.append((replacement, name))
    return offered, refused
