"""A tree from YAML, matched against the schema: known keys only, values of the right type.

Types are converted by OmegaConf's value nodes, one value at a time, so that every fault is found in one
pass; the result is a plain nested dict that OmegaConf merges into the defaults afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from ddetr_mm.errors import Problem
from ddetr_mm.spec.aliases import canonical
from ddetr_mm.spec.interpolation import Steps, has_interpolation, is_reference
from ddetr_mm.spec.source import Branch, Leaf, Listing, Tree
from ddetr_mm.spec.suggest import suggest_key
from ddetr_mm.spec.walk import FieldType, Kind, SchemaField, fields_of

MISSING = "???"
MAX_INTEGER = 2**63 - 1
MAX_SUGGESTIONS = 50
_TEXT = FieldType(Kind.SCALAR, str, False)
_ANY = FieldType(Kind.SCALAR, Any, True)
_NODES: dict[type, Any] = {int: IntegerNode, float: FloatNode, str: StringNode, bool: BooleanNode}


def dotted(path: Steps) -> str:
    """``("a", 0, "b")`` as ``a[0].b``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Binder:
    """Matches one tree against the schema below ``root``.

    Attributes:
        problems: what is wrong, in the order of the file.
        faulty: dotted paths that have a problem.
        where: dotted path → ``"line 12"`` or ``"override"``, for everything the user wrote.
        interpolations: paths of values that contain ``${``.
        notes: what was accepted in another form than the documented one.
    """

    def __init__(self, root: type, file: Path | None) -> None:
        self.root = root
        self.file = file
        self.problems: list[Problem] = []
        self.faulty: set[str] = set()
        self.where: dict[str, str] = {}
        self.interpolations: list[Steps] = []
        self.notes: list[str] = []

    def fault(self, path: Steps, where: str, what: str, **more: Any) -> None:
        """Record a problem of the value at ``path``."""
        name = dotted(path)
        self.faulty.add(name)
        self.problems.append(Problem(what, file=self.file, where=f"{name}, {where}", **more))

    def note(self, path: Steps, tree: Tree, what: str) -> None:
        """Record that a value was accepted in another form."""
        self.notes.append(f"{dotted(path)} ({tree.where}) {what}")

    def section(self, tree: Tree | None, cls: type, path: Steps = ()) -> dict[str, Any]:
        """The values of a section, by field name; unknown and wrong ones are left out."""
        if tree is None or (isinstance(tree, Leaf) and tree.value is None):
            return {}
        known = fields_of(cls)
        if not isinstance(tree, Branch):
            what = "is not a section" if path else "the spec is not a mapping of keys to values"
            self.fault(
                path or ("the file",),
                tree.where,
                what,
                allowed="lines of key: value below it, of " + ", ".join(known),
            )
            return {}
        values: dict[str, Any] = {}
        for key, item in tree.items.items():
            name = canonical(dotted(path), key)
            if name not in known:
                prefix = dotted(path) + "." if path else ""
                hint = None
                if len(self.problems) < MAX_SUGGESTIONS:
                    hint = suggest_key(self.root, prefix, key, known)
                self.fault((*path, key), item.where, "is not a key of the spec", hint=hint)
                continue
            if name != key and not self.accept_alias((*path, key), name, item, tree):
                continue
            self.field(values, known[name], item, (*path, name))
        return values

    def accept_alias(self, path: Steps, name: str, item: Tree, parent: Branch) -> bool:
        """Note the use of a field's second name; refuse it beside the first."""
        if name in parent.items:
            other = dotted((*path[:-1], name))
            self.fault(path, item.where, f"is another name of {other}, which is given too", hint="keep one")
            return False
        self.note(path, item, f"is read as {dotted((*path[:-1], name))}")
        return True

    def field(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """Convert one field's value and put it into ``values``."""
        self.where[dotted(path)] = tree.where
        kind, optional = one.type.kind, one.type.optional
        if isinstance(tree, Leaf):
            if tree.value == MISSING:
                if not one.meta.placeholder:
                    self.fault(path, tree.where, "still holds the placeholder ???", hint="give a value")
                return
            plain_section = kind is Kind.SECTION and not optional
            if tree.value is None and not plain_section:
                if optional:
                    values[one.name] = None
                else:
                    self.fault(path, tree.where, "has no value", value=None, allowed=one.type.words())
                return
            wrapped = kind is Kind.SCALARS and one.meta.single
            if not plain_section and not wrapped and self.is_interpolation(tree, path, one.type):
                values[one.name] = tree.value
                return
        if kind is Kind.SECTION:
            values[one.name] = self.section(self.single_section(one, tree, path), one.type.base, path)
        elif kind is Kind.MAPPING:
            self.mapping(values, one, tree, path)
        elif kind is Kind.SCALAR:
            self.scalar(values, one, tree, path)
        else:
            self.listing(values, one, tree, path)

    def is_interpolation(self, leaf: Leaf, path: Steps, kind: FieldType) -> bool:
        """Whether a value is for OmegaConf to resolve (``${...}``); remembers its path if so.

        Text may hold interpolations, plain or escaped; a number needs one; a list or mapping must be one.
        """
        text = leaf.value
        if not isinstance(text, str) or "${" not in text:
            return False
        if kind.kind is not Kind.SCALAR:
            fits = is_reference(text)
        else:
            fits = kind.base in (str, Any) or has_interpolation(text)
        if fits:
            self.interpolations.append(path)
        return fits

    def single_section(self, one: SchemaField, tree: Tree, path: Steps) -> Tree:
        """A list of one section where one section is expected: that section, with a note."""
        if isinstance(tree, Listing) and one.type.optional and len(tree.items) == 1:
            self.note(path, tree, "takes one source; its list of one is read as that")
            return tree.items[0]
        return tree

    def scalar(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """Convert a single value."""
        if not isinstance(tree, Leaf):
            shown = "a mapping" if isinstance(tree, Branch) else "a list"
            self.fault(path, tree.where, f"is {shown}", allowed=one.type.words())
            return
        found, value = self.convert(tree, one, path)
        if found:
            values[one.name] = value

    def convert(self, leaf: Leaf, one: SchemaField, path: Steps) -> tuple[bool, Any]:
        """A leaf as the field's (or its items') type: whether that worked, and the value."""
        base = one.type.base
        allowed = FieldType(Kind.SCALAR, base, one.type.kind is Kind.SCALAR and one.type.optional).words()
        value = leaf.value
        if base is str:
            # The text as it stands in the file: no, 1_000 and 007 are names like any other.
            value = leaf.text
            if "\0" in value:
                self.fault(path, leaf.where, "holds a null character", value=value, hint="leave it out")
                return False, None
        shown: Any = "<hidden>" if one.meta.secret else leaf.value
        if base is bool and isinstance(value, int) and value not in (0, 1):
            self.fault(path, leaf.where, "is of the wrong type", value=shown, allowed=allowed)
            return False, None
        if base is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            if base is not str and isinstance(value, str) and "${" in value:
                raise ValueError(value)  # OmegaConf's nodes would take it for an interpolation
            value = _NODES[base](value)._value()
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            hint = None
            if base is not str and isinstance(value, str) and value.strip() == "":
                hint = "give a value or leave the key out"
            self.fault(path, leaf.where, "is of the wrong type", value=shown, allowed=allowed, hint=hint)
            return False, None
        if base is int and abs(value) > MAX_INTEGER:
            self.fault(path, leaf.where, "is too large a number", allowed="integers of 64 bits")
            return False, None
        return True, value

    def listing(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """A list of scalars or of sections."""
        sections = one.type.kind is Kind.SECTIONS
        if one.meta.single and isinstance(tree, Branch if sections else Leaf):
            if sections:
                self.note(path, tree, "takes a list; its one entry is read as that")
            tree = Listing([tree], tree.where)
        if not isinstance(tree, Listing):
            shown = tree.text if isinstance(tree, Leaf) else "a mapping"
            hint = None
            if isinstance(tree, Leaf):
                hint = f"write [{tree.text}]"
            self.fault(path, tree.where, "is not a list", value=shown, allowed=one.type.words(), hint=hint)
            return
        items = []
        for index, item in enumerate(tree.items):
            here = (*path, index)
            self.where[dotted(here)] = item.where
            if sections:
                if isinstance(item, Leaf) and self.is_interpolation(
                    item, here, FieldType(Kind.SECTION, one.type.base, False)
                ):
                    items.append(item.value)
                elif isinstance(item, Branch):
                    items.append(self.section(item, one.type.base, here))
                else:
                    words = "a section: " + ", ".join(fields_of(one.type.base))
                    self.fault(here, item.where, "is not a section", allowed=words)
            elif not isinstance(item, Leaf) or item.value is None or item.value == MISSING:
                shown = item.text if isinstance(item, Leaf) else "a list or mapping"
                allowed = FieldType(Kind.SCALAR, one.type.base, False).words()
                self.fault(here, item.where, "is of the wrong type", value=shown, allowed=allowed)
            elif self.is_interpolation(item, here, FieldType(Kind.SCALAR, one.type.base, False)):
                items.append(item.value)
            else:
                found, value = self.convert(item, one, here)
                if found:
                    items.append(value)
        values[one.name] = items

    def mapping(self, values: dict[str, Any], one: SchemaField, tree: Tree, path: Steps) -> None:
        """A free mapping: of names to text, or of names to anything."""
        if not isinstance(tree, Branch):
            self.fault(path, tree.where, "is not a mapping", allowed=one.type.words())
            return
        if one.type.base is not str:
            values[one.name] = self.anything(tree, path)
            return
        entries: dict[str, Any] = {}
        for key, item in tree.items.items():
            here = (*path, key)
            self.where[dotted(here)] = item.where
            if not isinstance(item, Leaf) or item.value is None or item.value == MISSING:
                self.fault(here, item.where, "is of the wrong type", allowed="text")
            elif self.is_interpolation(item, here, _TEXT):
                entries[key] = item.value
            else:
                entries[key] = item.text
        values[one.name] = entries

    def anything(self, tree: Tree, path: Steps) -> Any:
        """The plain value of a tree in a free mapping."""
        self.where[dotted(path)] = tree.where
        if isinstance(tree, Branch):
            return {key: self.anything(item, (*path, key)) for key, item in tree.items.items()}
        if isinstance(tree, Listing):
            return [self.anything(item, (*path, index)) for index, item in enumerate(tree.items)]
        if tree.value == MISSING:
            self.fault(path, tree.where, "still holds the placeholder ???", hint="give a value")
            return None
        self.is_interpolation(tree, path, _ANY)
        return tree.value
