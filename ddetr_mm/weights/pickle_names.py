"""Which classes and functions a pickle asks for, and what each of them gets instead of itself.

``torch.load(weights_only=True)`` refuses every global it does not know. That is right for code and too
strict for bookkeeping: Lightning and mmengine store harmless containers beside the weights. The way out
here never imports or calls anything a file names:

- the names are listed with :mod:`pickletools`, which only reads;
- names torch itself allows (tensors, storages, OrderedDict) are left to torch;
- names of known bookkeeping classes are bound to inert stand-ins of ours, which keep what they are given
  and do nothing;
- a file with any other name is refused, and the message says which name it was.

Listing the names decides only which stand-ins are offered. What may run is decided by torch's
weights-only unpickler alone, which looks names up in its own table and in ours, nowhere else.
"""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TypeAlias

SafeGlobal: TypeAlias = "Callable[..., Any] | tuple[Callable[..., Any], str]"


class InertObject:
    """Stands for an object of a bookkeeping class: keeps its arguments and state, does nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> InertObject:
        """Make an empty stand-in whatever the arguments are."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **_options: Any) -> None:
        self.arguments = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep the state as it is."""
        self.state = state


class InertDict:
    """Stands for a dictionary class; calling it gives an ordered dictionary of plain data."""

    def __new__(cls, *_args: Any, **_options: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """An empty dictionary, which the unpickler then fills."""
        return OrderedDict()


class InertList:
    """Stands for a list class; calling it gives a plain list."""

    def __new__(cls, *_args: Any, **_options: Any) -> list[Any]:  # type: ignore[misc]
        """An empty list, which the unpickler then fills."""
        return []


class InertHistory(InertObject):
    """Stands for mmengine's HistoryBuffer."""


class InertMethod(InertObject):
    """Stands for the methods of HistoryBuffer that mmengine pickles as ``getattr(HistoryBuffer, name)``."""

    def __new__(cls, owner: Any = None, name: Any = None, *_rest: Any, **_options: Any) -> InertMethod:
        """Make a stand-in for a statistics method of a history; refuse to be asked for anything else.

        Raises:
            pickle.UnpicklingError: for an attribute of any other object, or of another name.
        """
        if owner is not InertHistory or name not in ("min", "max", "current", "mean"):
            raise pickle.UnpicklingError(f"asks for attribute {name!r} of {owner!r} by builtins.getattr")
        return object.__new__(cls)


_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_LIGHTNING = r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities)"
_CLASS_NAME = r"_?[A-Z]\w*"

_STAND_INS: tuple[tuple[str, type], ...] = (
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
    (r"numpy\.(core|_core)\.multiarray\.(_reconstruct|scalar)", InertObject),
    (rf"numpy\.(ndarray|dtype|dtypes\.{_CLASS_NAME}|bool_?|u?int(8|16|32|64)|float(16|32|64))", InertObject),
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
    # Built-in types as values (the type argument of a defaultdict, a field's type …). They are never called:
    # a stand-in takes their place.
    (r"builtins\.(int|float|str|bool|list|dict|tuple|frozenset|bytes|object)", InertObject),
)

# What torch's weights-only unpickler may allow by itself (it has the last word): the parts of tensors.
_TORCH_OWN = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.(storage\.)?\w*Storage|torch\.(cuda\.)?\w*Tensor|torch\.(Size|device)|torch\.nn\.parameter\.Parameter"
    r"|torch\.(bool|half|float|double|short|int|long|[a-z]\w*\d\w*|per_\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)

_COMPILED = tuple((re.compile(pattern), stand_in) for pattern, stand_in in _STAND_INS)


def stand_in_for(name: str) -> type | None:
    """The inert class that takes the place of a known bookkeeping class, or None for any other name.

    Args:
        name: dotted name, module first.
    """
    for pattern, stand_in in _COMPILED:
        if pattern.fullmatch(name):
            return stand_in
    return None


def names_in_pickle(pickled: bytes | BinaryIO) -> list[str]:
    """The dotted names of every class and function a pickle asks for, in order, without running it.

    Args:
        pickled: a pickle, or a file standing at the start of one, which is left standing behind its end.

    Raises:
        ValueError: when there is no whole pickle. Damaged bytes may raise other errors of
            :mod:`pickletools` (IndexError, OverflowError, UnicodeDecodeError), too.
    """
    names: dict[str, None] = {}
    strings: list[str] = []
    for opcode, argument, _position in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            names[_modern(module, name)] = None
        elif opcode.name == "STACK_GLOBAL":
            # Protocol 4 takes module and name from the stack: usually the two strings put there last.
            names[".".join(strings[-2:]) or "a name put together at run time"] = None
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            names[f"extension registry entry {argument}"] = None
        if isinstance(argument, str) and "UNICODE" in opcode.name:
            strings = [*strings[-1:], argument]
    return list(names)


def _modern(module: str, name: str) -> str:
    """A name as Python 3 has it: pickles of protocol 2 keep the names of Python 2 (``__builtin__ long``)."""
    renamed = _compat_pickle.NAME_MAPPING.get((module, name))
    if renamed is None:
        renamed = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    return ".".join(renamed)


def sort_names(
    names: Iterable[str],
) -> tuple[list[SafeGlobal], list[str]]:
    """Decide on every name a file asks for.

    Args:
        names: dotted names.

    Returns:
        ``(stand-in, name)`` pairs for :func:`torch.serialization.add_safe_globals`, and the names that stay
        refused.
    """
    names = list(names)
    offered: list[SafeGlobal] = []
    refused: list[str] = []
    for name in names:
        if _TORCH_OWN.fullmatch(name):
            continue
        stand_in = stand_in_for(name)
        if name == "builtins.getattr" and _HISTORY in names:
            stand_in = InertMethod
        if stand_in is None:
            refused.append(name)
        else:
            offered.append((stand_in, name))
    return offered, refused
