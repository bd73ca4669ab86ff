"""Errors that a user can cause.

Every command turns an :class:`InputError` into one message on standard error and exit status 2; any other
exception is a defect of this package (exit status 1). The module imports nothing of ours, so that every layer
may use it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<unset>"})()


@dataclass(frozen=True)
class Problem:
    """One fault of the input, with all that a user needs to fix it.

    Attributes:
        what: the fault in a few words, e.g. ``"is not an option"``.
        file: the file with the fault.
        where: a dotted key path, a line (``"line 12"``), or both.
        value: the offending value; left out of the message when not given.
        allowed: what would be accepted, in words or as a list.
        hint: what the user can do.
    """

    what: str
    file: str | PathLike[str] | None = None
    where: str | None = None
    value: Any = _UNSET
    allowed: Any = None
    hint: str | None = None

    def __str__(self) -> str:
        place = ": ".join(printable(part) for part in (self.file, self.where) if part)
        what = printable(self.what)
        text = f"{place}: {what}" if place else what
        if self.value is not _UNSET:
            text += f" (got {shorten(self.value)})"
        if self.allowed is not None:
            allowed = self.allowed
            if not isinstance(allowed, str):
                allowed = ", ".join(str(option) for option in allowed)
            text += f"; allowed: {printable(allowed)}"
        if self.hint:
            text += f"; {printable(self.hint)}"
        return text


_WORKER_MARK = "\nOriginal Traceback (most recent call last):\n"


class InputError(Exception):
    """Wrong input: a spec, a data file, a checkpoint, an argument or the environment.

    Args:
        problems: one or several :class:`Problem`, or plain text. All are shown at once. PyTorch re-raises an
            error of a data worker with the traceback as its only text: of that the message is kept.
    """

    exit_status = 2

    def __init__(self, *problems: Problem | str) -> None:
        found: list[Problem] = []
        for problem in problems:
            texts = [problem] if isinstance(problem, Problem) else self._messages_in(problem)
            found += [text if isinstance(text, Problem) else Problem(text) for text in texts]
        self.problems: tuple[Problem, ...] = tuple(found)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def _messages_in(cls, text: str) -> list[str]:
        """The messages of an error of this class where ``text`` is a worker's traceback, else ``text``."""
        heading = f"\n{cls.__module__}.{cls.__qualname__}: "
        return text.rpartition(heading)[2].strip().splitlines() if _WORKER_MARK in text else [text]

    @classmethod
    def collect(cls, problems: Iterable[Problem]) -> None:
        """Raise one error that holds all ``problems``; do nothing when there are none."""
        found = tuple(problems)
        if found:
            raise cls(*found)


class SpecError(InputError):
    """The YAML spec or a ``key=value`` override is wrong."""


class DataError(InputError):
    """Images, labels or annotation files are wrong or missing."""


class WeightsError(InputError):
    """A checkpoint cannot be read, or does not fit the model."""


class ExportError(InputError):
    """A model cannot be exported as asked, or the export does not agree with PyTorch."""


class RunError(InputError):
    """A run was ended by the machine: a killed process, too little memory."""

    exit_status = 1


class TrainingError(InputError):
    """A training run cannot continue because its loss or gradients are not finite."""

    exit_status = 1


class StackError(InputError):
    """Torch, mmcv, mmdet or another part of the environment is missing or does not fit."""


class RankFailure(Exception):
    """A rank of a distributed run has failed, and the run with it.

    Args:
        reason: which rank and why, for the user.
        rank: its number in the job.
        exit_status: exit status of the command.
        killed: whether a signal killed it.
        details: its traceback, if there is one.
    """

    def __init__(
        self,
        reason: str,
        *,
        rank: int,
        exit_status: int = 1,
        killed: bool = False,
        details: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.rank = rank
        self.exit_status = exit_status
        self.killed = killed
        self.details = details


# Characters that move the cursor, change the terminal or the direction of the text around them.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")


def printable(text: Any) -> str:
    """Return a text on one line, in which no character acts on the terminal: such are shown escaped.

    For names out of files (classes, keys, file names) in messages, tables and logs: a name with a line break
    could look like a message of ours, one with an escape sequence could erase it.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shorten(value: Any, limit: int = 120) -> str:
    """``repr`` of a value, cut to ``limit`` characters for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
