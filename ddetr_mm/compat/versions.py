"""Do the installed torch, mmengine, mmdet and mmcv fit? Asked of their metadata: none is imported."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddetr_mm.errors import Problem, StackError

# Looks a distribution's version up; raises importlib.metadata.PackageNotFoundError.
VersionOf = Callable[[str], str]


class StackImportError(StackError, ImportError):
    """The environment does not fit, found while ``ddetr_mm`` is imported.

    An :class:`ImportError`, so that ``try: import ddetr_mm`` works as for any package, and a
    :class:`~ddetr_mm.errors.StackError`, so that the command line shows it as one message.
    """


@dataclass(frozen=True)
class Requirement:
    """One package that must be there.

    Attributes:
        module: the name it is imported by.
        distributions: every distribution that gives this module, with the versions of it that fit
            (``>=`` and ``<`` clauses, joined by commas; empty for any).
        install: what to hand to ``pip install`` when none is there.
    """

    module: str
    distributions: dict[str, str]
    install: str


# The ranges of pyproject.toml (a test holds the two together), and the maintained forks, which number
# their versions on from the originals'. mmdet < 3.4 takes no mmcv from 2.2 on; the fork takes its own.
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

    The ``ddetr-mm`` command defers the error (:func:`raise_deferred`): its ``-h`` must answer, and
    ``install-ops`` must run, in an environment that is not complete yet.

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
    """Raise what :func:`check_on_import` found and put off for the command line; nothing if all fits."""
    if _deferred is not None:
        raise _deferred


def check_versions(version_of: VersionOf = importlib.metadata.version) -> None:
    """Raise one error with everything about the installed versions that does not fit.

    Args:
        version_of: looks up a distribution's version.

    Raises:
        StackImportError: a package is missing, of a version that does not fit, or there twice.
    """
    problems: list[Problem] = []
    found: dict[str, str] = {}
    for requirement in REQUIREMENTS:
        problems += _check(requirement, version_of, found)
    if not problems:
        problems += _check_torchvision(found)
    StackImportError.collect(problems)


def _check(requirement: Requirement, version_of: VersionOf, found: dict[str, str]) -> list[Problem]:
    """The problems with one package; its version goes into ``found`` under the distribution's name."""
    here: dict[str, str] = {}
    for name in requirement.distributions:
        try:
            here[name] = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found.update(here)
    hint = f"run: pip install {_quoted(requirement.install)}"
    if not here:
        return [Problem(f"{requirement.module} is not installed", hint=hint)]
    if len(here) > 1:
        names = " and ".join(here)
        return [
            Problem(
                f"{names} are both installed and overwrite each other's files",
                hint=f"run: pip uninstall -y {' '.join(here)} && pip install {_quoted(requirement.install)}",
            )
        ]
    ((name, version),) = here.items()
    allowed = requirement.distributions[name]
    if fits(version, allowed):
        return []
    pin = requirement.install if requirement.install.startswith(f"{name}==") else f"{name}{allowed}"
    return [
        Problem(
            f"{name} {version} does not fit",
            allowed=allowed,
            hint=f"run: pip install {_quoted(pin)}",
        )
    ]


def _check_torchvision(found: dict[str, str]) -> list[Problem]:
    """Torchvision names the torch it was built for; with another one it fails on import."""
    for line in importlib.metadata.requires("torchvision") or ():
        name, _, built_for = line.replace(" ", "").partition("==")
        if name == "torch" and built_for and release(built_for)[:2] != release(found["torch"])[:2]:
            return [
                Problem(
                    f"torchvision {found['torchvision']} was built for torch {built_for}, "
                    f"but torch is {found['torch']}",
                    hint=f"run: pip install torch=={found['torch'].partition('+')[0]} torchvision",
                )
            ]
    return []


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release part: ``"2.11.0+cu130"`` gives ``(2, 11, 0)``."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:  # 2rc1, 0a0: what follows is no number
            break
    return tuple(numbers)


def fits(version: str, allowed: str) -> bool:
    """Whether a version is within ``>=`` and ``<`` clauses; a pre-release counts as its release.

    ``packaging`` has the full rules; it is not used because it would double the time of the import.
    """
    for clause in filter(None, allowed.split(",")):
        at_least = clause.startswith(">=")
        bound = release(clause[2:] if at_least else clause[1:])
        length = max(len(bound), len(release(version)))
        have = release(version) + (0,) * (length - len(release(version)))
        bound += (0,) * (length - len(bound))
        if (have < bound) if at_least else (have >= bound):
            return False
    return True


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
