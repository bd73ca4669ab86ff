"""Bounds of a pickle, found without building anything: how deep and how large its objects would be.

A pickle of a few hundred bytes can describe a tuple that holds itself twice, forty times over: as a key of a
dictionary it takes years to hash, and any code that walks through it never ends. :func:`check_pickle` follows
the opcodes on a stack of its own, in which containers have a size only, and refuses what is out of bounds.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 100
"""Containers inside one another. Checkpoints of real runs have about ten."""

MIN_SIZE = 1_000_000
SIZE_PER_OPCODE = 64
"""Values that a pickle may stand for, when shared ones are counted each time: an allowance, and so many for
every opcode."""


class OutOfBounds(Exception):
    """What a pickle describes is too deep, too large, or no plain data."""


class _Node:
    """A value on the stack: what matters of it.

    Attributes:
        kind: ``text``, ``int``, ``scalar``, ``tuple``, ``list``, ``dict``, ``object`` or a global's name.
        size: values in it when it was made, shared ones counted each time.
        depth: containers inside one another when it was made.
        children: of a container, those that are containers.
        has_int: whether a whole number is in it.
    """

    __slots__ = ("children", "depth", "has_int", "kind", "size")

    def __init__(self, kind: str, size: int = 1, depth: int = 0) -> None:
        self.kind = kind
        self.size = size
        self.depth = depth
        self.has_int = False
        self.children: list[_Node] = []


_SCALAR, _TEXT, _INT = _Node("scalar"), _Node("text"), _Node("int")
_MARK = _Node("mark")
_KINDS = {"INT": _INT, "LONG": _INT, "BININT": _INT, "BININT1": _INT, "BININT2": _INT}
_KINDS |= {"LONG1": _INT, "LONG4": _INT, "NEWTRUE": _INT, "NEWFALSE": _INT}
_ALLOCATING = ("builtins bytearray", "__builtin__ bytearray", "builtins bytes", "__builtin__ bytes")


class _Machine:
    """Follows the opcodes of one pickle."""

    def __init__(self) -> None:
        self.stack: list[_Node] = []
        self.memo: dict[int, _Node] = {}
        self.containers: list[_Node] = []
        self.strings: list[str] = []
        self.opcodes = 0

    def limit(self) -> int:
        return MIN_SIZE + SIZE_PER_OPCODE * self.opcodes

    def step(self, name: str, argument: Any) -> None:
        self.opcodes += 1
        if "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            self.strings = [*self.strings[-1:], str(argument)]
            self.stack.append(_TEXT)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        elif name in ("PROTO", "FRAME", "STOP", "READONLY_BUFFER"):
            return
        else:
            self.stack.append(_KINDS.get(name, _SCALAR))

    def pop(self) -> _Node:
        node = self.stack.pop()
        if node is _MARK:
            raise OutOfBounds("has a stack out of order")
        return node

    def marked(self) -> list[_Node]:
        """Pop everything above the last mark, and the mark."""
        items: list[_Node] = []
        while (node := self.stack.pop()) is not _MARK:
            items.append(node)
        return items[::-1]

    def push(self, kind: str, items: Iterable[_Node] = ()) -> None:
        node = _Node(kind)
        self.containers.append(node)
        self.fill(node, items)
        self.stack.append(node)

    def fill(self, node: _Node, items: Iterable[_Node]) -> None:
        for item in items:
            if item is _MARK:
                raise OutOfBounds("has a stack out of order")
            node.size += item.size
            node.has_int |= item is _INT
            node.depth = max(node.depth, item.depth + 1)
            if item.depth or item.size > 1 or item.kind in ("list", "dict", "object", "tuple"):
                node.children.append(item)
        if node.depth > MAX_DEPTH:
            raise OutOfBounds(f"nests values more than {MAX_DEPTH} deep")
        if node.size > self.limit():
            raise OutOfBounds("stands for far more values than it has bytes")

    def pairs(self, node: _Node, items: list[_Node]) -> None:
        for key in items[::2]:
            if key.kind == "tuple" and key.size > MAX_DEPTH:
                raise OutOfBounds("has a key that is a nested tuple")
        self.fill(node, items)

    def call(self, function: _Node, arguments: list[_Node]) -> None:
        if function.kind in _ALLOCATING and any(one is _INT or one.has_int for one in arguments):
            raise OutOfBounds("asks for memory by a number")
        self.push("object", arguments)

    def check_shared(self) -> None:
        """Count everything again, as containers may have been filled after they were shared."""
        sizes: dict[int, int] = {}
        open_: set[int] = set()
        limit = self.limit()
        for root in self.containers:
            waiting = [(root, False)]
            while waiting:
                node, done = waiting.pop()
                if done:
                    open_.discard(id(node))
                    own = max(node.size - sum(child.size for child in node.children), 1)
                    total = own + sum(sizes.get(id(child), 1) for child in node.children)
                    if total > limit:
                        raise OutOfBounds("stands for far more values than it has bytes")
                    sizes[id(node)] = total
                elif id(node) not in sizes and id(node) not in open_:
                    open_.add(id(node))
                    waiting.append((node, True))
                    waiting += [(child, False) for child in node.children]


def _append(machine: _Machine, _argument: Any) -> None:
    item = machine.pop()
    machine.fill(machine.stack[-1], [item])


def _appends(machine: _Machine, _argument: Any) -> None:
    items = machine.marked()
    machine.fill(machine.stack[-1], items)


def _set_item(machine: _Machine, _argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.pairs(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _argument: Any) -> None:
    items = machine.marked()
    machine.pairs(machine.stack[-1], items)


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _argument: Any) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push("tuple", items[::-1])

    return make


def _global(machine: _Machine, argument: Any) -> None:
    machine.stack.append(_Node(str(argument)))


def _stack_global(machine: _Machine, _argument: Any) -> None:
    machine.pop()
    machine.pop()
    machine.stack.append(_Node(" ".join(machine.strings[-2:])))


def _reduce(machine: _Machine, _argument: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, [arguments])


def _new_object_with_names(machine: _Machine, _argument: Any) -> None:
    names, arguments, function = machine.pop(), machine.pop(), machine.pop()
    machine.call(function, [arguments, names])


def _old_object(machine: _Machine, _argument: Any) -> None:
    items = machine.marked()
    machine.call(items[0], items[1:])


def _instance(machine: _Machine, argument: Any) -> None:
    machine.call(_Node(str(argument)), machine.marked())


def _build(machine: _Machine, _argument: Any) -> None:
    # A state may refer to its object again, as OmegaConf's do: it is counted, and not followed.
    machine.pop()


def _persistent(machine: _Machine, _argument: Any) -> None:
    machine.pop()
    machine.stack.append(_SCALAR)


def _dictionary(machine: _Machine, _argument: Any) -> None:
    items = machine.marked()
    machine.push("dict")
    machine.pairs(machine.stack[-1], items)


_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.marked(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.push("tuple", machine.marked()),
    "EMPTY_LIST": lambda machine, _: machine.push("list"),
    "LIST": lambda machine, _: machine.push("list", machine.marked()),
    "EMPTY_DICT": lambda machine, _: machine.push("dict"),
    "DICT": _dictionary,
    "EMPTY_SET": lambda machine, _: machine.push("list"),
    "FROZENSET": lambda machine, _: machine.push("tuple", machine.marked()),
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_names,
    "OBJ": _old_object,
    "INST": _instance,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def check_pickle(pickled: Any) -> None:
    """Check what a pickle would build.

    Args:
        pickled: a pickle, or a file at the start of one, which is read to its end.

    Raises:
        OutOfBounds: it is too deep or too large, or its stack is out of order.
        ValueError: the pickle is incomplete. Damaged bytes may raise other errors of :mod:`pickletools`
            (IndexError, OverflowError, UnicodeDecodeError).
    """
    machine = _Machine()
    try:
        for opcode, argument, _position in pickletools.genops(pickled):
            machine.step(opcode.name, argument)
        machine.pop()  # the result
    except (IndexError, KeyError) as error:
        raise OutOfBounds("has a stack out of order") from error
    machine.check_shared()
