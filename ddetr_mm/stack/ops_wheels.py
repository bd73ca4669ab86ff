"""Finding a wheel of mmcv that was built before, for the same torch, Python and CUDA."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ddetr_mm.errors import Problem, StackError
from ddetr_mm.stack.ops_target import MMCV_VERSION, Target

WHEELS_VARIABLE = "DDETR_MM_WHEELS"

# torch2.14.1-cpu, torch2.11.0-cu130-sm90
_FOLDER = re.compile(r"torch(?P<torch>\d[\w.]*)-(?P<cuda>cpu|cu\d+)(?P<architectures>(-sm\d+)*)$")


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Where wheels are kept between environments: ``~/.cache/ddetr_mm/wheels``."""
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ddetr_mm" / "wheels"


def candidates(target: Target, variables: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Wheels that may fit, best first: the caller's own, the checkout's neighbours, the cache.

    A name can promise what the file does not hold, so each has to be tried out.

    Args:
        target: what the wheel must fit.
        variables: ``DDETR_MM_WHEELS`` (a wheel or a folder) and ``XDG_CACHE_HOME`` are read.

    Raises:
        StackError: ``DDETR_MM_WHEELS`` names nothing that exists.
    """
    asked = variables.get(WHEELS_VARIABLE)
    if asked:
        place = Path(asked)
        if not place.exists():
            raise StackError(
                Problem(
                    "does not exist",
                    file=asked,
                    where=WHEELS_VARIABLE,
                    mend="name a wheel or a folder of them",
                )
            )
        yield from [place] if place.is_file() else _in_folder(place, target)
    beside_checkout = Path(__file__).resolve().parents[3] / "shared" / "wheels"
    if beside_checkout.is_dir():
        yield from _in_folder(beside_checkout, target)
    yield from _wheels(cache_folder(variables) / target.key, target)


def _in_folder(folder: Path, target: Target) -> Iterator[Path]:
    """Wheels in a folder itself, and in those of its folders whose names fit, the closest first."""
    yield from _wheels(folder, target)
    named = [(folder_fit(path.name, target), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    for fit, path in sorted(named, key=lambda pair: -pair[0]):
        if fit:
            yield from _wheels(path, target)


def folder_fit(name: str, target: Target) -> int:
    """How well a folder named like ``torch2.11.0-cu130-sm90`` fits: 2 exactly, 1 usable, 0 not at all.

    CUDA ops serve a machine that asks for CPU ops; not the other way round.
    """
    match = _FOLDER.match(name)
    if not match or match["torch"] != target.torch_release:
        return 0
    if target.cuda is None:
        return 2 if match["cuda"] == "cpu" else 1
    if match["cuda"] != f"cu{target.cuda.replace('.', '')}":
        return 0
    there = set(match["architectures"].split("-sm")[1:])
    wanted = {name.replace(".", "").removesuffix("+PTX") for name in target.architectures}
    return 2 if wanted <= there else 0


def _wheels(folder: Path, target: Target) -> list[Path]:
    """Wheels of the right mmcv and Python in one folder."""
    return sorted(folder.glob(f"mmcv-{MMCV_VERSION}-{target.python_tag}-*.whl"))
