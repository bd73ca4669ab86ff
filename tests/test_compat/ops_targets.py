"""Environments and targets that the tests of building ops share."""

from dataclasses import replace

from ddetr_mm.compat.install_ops import Environment, Target

CPU = Target(torch="2.14.1+cu130", cuda=None, architectures=(), python_tag="cp311", platform="linux_x86_64")
CUDA = replace(CPU, torch="2.11.0+cu130", cuda="13.0", architectures=("9.0",), python_tag="cp312")


def environment(folder, **changes):
    """An environment with everything a build needs, in ``folder``."""
    header = folder / "Python.h"
    header.write_text("", encoding="utf-8")
    return replace(
        Environment(
            torch="2.14.1+cu130",
            torch_cuda="13.0",
            torch_folder=str(folder / "torch"),
            gpus=(),
            python_tag="cp311",
            platform="linux_x86_64",
            site_packages=str(folder),
            python_header=str(header),
        ),
        **changes,
    )


def executable(path, text="#!/bin/sh\n"):
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path
