"""Checks by metadata that the installed torch, mmengine, mmdet and mmcv fit; imports none of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ddetr_mm.errors import Problem, StackError

VersionOf = Callable[[str], str]
"""Looks up a distribution's version; raises ``importlib.metadata.PackageNotFoundError``."""


class StackImportError(StackError, ImportError):
    """The installed packages do not fit, found while ``ddetr_mm`` is imported.

    An :class:`ImportError`, so that ``try: import ddetr_mm`` works as for any package, and a
    :class:`~ddetr_mm.errors.StackError`, so that the command line shows it as one message.
    """


@dataclass(frozen=True)
class Requirement:
    """A package that must be installed.

    Attributes:
        module: the name it is imported by.
        distributions: every distribution that provides this module, with the range of versions that fit.
        install: the argument of ``pip install`` where none is installed.
    """

    module: str
    distributions: dict[str, str]
    install: str


# The ranges of pyproject.toml, and the maintained forks (onedl-*), whose versions continue the originals'.
# mmdet < 3.4 refuses mmcv >= 2.2; the fork accepts its own.
REQUIREMENTS = (
    Requirement("torch", {"torch": ">=2.6"}, "torch torchvision"),
    Requirement("torchvision", {"torchvision": ">=0.21"}, "torchvision"),
    Requirement("mmengine", {"mmengine": ">=0.10.7,<1", "onedl-mmengine": ">=0.10.7,<1"}, "mmengine==0.10.7"),
    Requirement("mmdet", {"mmdet": ">=3.3,<3.4", "onedl-mmdetection": ">=3.3,<4"}, "mmdet==3.3.0"),
    Requirement(
        "mmcv",
        {"mmcv": ">=2.0,<2.2", "mmcv-lite": ">=2.0,<2.2", "onedl-mmcv": ">=2.0,<3"},
        "mmcv-lite==2.1.0",
    ),
)

_deferred: StackImportError | None = None


def check_on_import() -> None:
    """Check the versions when the package is imported.

    The ``ddetr-mm`` command defers the error (:func:`raise_deferred`): ``-h`` and ``install-ops`` must work
    in an environment that is not complete yet.

    Raises:
        StackImportError: something is missing or does not fit; the message holds the ``pip`` line.
    """
    global _deferred
    try:
        check_versions()
    except StackImportError as error:
        if not _is_our_command():
            raise
        _deferred = error


def raise_deferred() -> None:
    """Raise the error that :func:`check_on_import` deferred for the command line, if any."""
    if _deferred is not None:
        raise _deferred


def check_versions(version_of: VersionOf = importlib.metadata.version) -> None:
    """Raise one error for all installed versions that do not fit.

    Args:
        version_of: looks up a distribution's version.

    Raises:
        StackImportError: a package is missing, has a version that does not fit, or is installed twice.
    """
    problems: list[Problem] = []
    found: dict[str, str] = {}
    for requirement in REQUIREMENTS:
        problems += _check(requirement, version_of, found)
    if not problems:
        problems += _check_torchvision(found)
    StackImportError.collect(problems)


def _check(requirement: Requirement, version_of: VersionOf, found: dict[str, str]) -> list[Problem]:
    """The problems with one package; ``found`` gets its version, by distribution."""
    installed: dict[str, str] = {}
    for name in requirement.distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = version_of(name)
    found.update(installed)
    hint = f"run: pip install {_quoted(requirement.install)}"
    if not installed:
        return [Problem(f"{requirement.module} is not installed", hint=hint)]
    if len(installed) > 1:
        what = f"{' and '.join(installed)} are both installed and overwrite each other's files"
        uninstall = f"pip uninstall -y {' '.join(installed)}"
        return [Problem(what, hint=f"run: {uninstall} && pip install {_quoted(requirement.install)}")]
    ((name, version),) = installed.items()
    allowed = requirement.distributions[name]
    if fits(version, allowed):
        return []
    pin = requirement.install if requirement.install.startswith(f"{name}==") else f"{name}{allowed}"
    return [
        Problem(f"{name} {version} does not fit", allowed=allowed, hint=f"run: pip install {_quoted(pin)}")
    ]


def _check_torchvision(found: dict[str, str]) -> list[Problem]:
    """The problem of a torchvision that was built for another torch, with which its import fails."""
    for line in importlib.metadata.requires("torchvision") or ():
        name, _, built_for = line.replace(" ", "").partition("==")
        if name == "torch" and built_for and built_for.split(".")[:2] != found["torch"].split(".")[:2]:
            return [
                Problem(
                    f"torchvision {found['torchvision']} was built for torch {built_for}, "
                    f"but torch is {found['torch']}",
                    hint=f"run: pip install torch=={found['torch'].partition('+')[0]} torchvision",
                )
            ]
    return []


def require(module: str, what: str = "this", *, package: str = "", hint: str = "") -> ModuleType:
    """Import a module of a package that only some commands need.

    Args:
        module: its name.
        what: what needs it, for the message.
        package: the name to install it by, where that is not the module's.
        hint: how to install it; ``pip install`` by default.

    Raises:
        StackError: it is not installed.
    """
    package = package or module
    try:
        return importlib.import_module(module)
    except ImportError as error:
        problem = Problem(f"{what} needs the package {package}", hint=hint or f"pip install {package}")
        raise StackError(problem) from error


def fits(version: str, allowed: str) -> bool:
    """Whether a version is in a range such as ``>=2.6,<3``; a pre-release counts as its release."""
    # Imported here: where nothing is installed, the message about that must still come.
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return Version(Version(version).base_version) in SpecifierSet(allowed)


def _quoted(requirements: str) -> str:
    """Requirements as a shell takes them: quoted where they hold ``<`` or ``>``."""
    return f"'{requirements}'" if set(requirements) & set("<>") else requirements


def _is_our_command() -> bool:
    """Whether this process is ``ddetr-mm`` or ``python -m ddetr_mm``."""
    if Path(sys.argv[0] if sys.argv else "").stem in ("ddetr-mm", "ddetr-mm-script"):
        return True
    arguments = sys.orig_argv
    # While `python -m` looks its module up, argv[0] is "-m".
    return sys.argv[:1] == ["-m"] and "-m" in arguments and arguments[arguments.index("-m") + 1] == "ddetr_mm"
