import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ops_targets import CPU, CUDA, environment, executable

from ddetr_mm.compat.install_ops import (
    DEFAULT_ARCHITECTURES,
    choose_target,
    find_compiler,
    find_toolkit,
    probe,
)
from ddetr_mm.errors import StackError


def test_probe_tells_of_the_running_environment():
    import torch

    told = probe(Path(sys.executable))
    assert told.torch == torch.__version__
    assert told.torch_cuda == torch.version.cuda
    assert told.python_tag == f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert Path(told.site_packages, "mmcv").is_dir()


def test_probe_of_what_is_no_interpreter(tmp_path):
    with pytest.raises(StackError, match="cannot be started"):
        probe(tmp_path / "python")


def test_probe_without_torch(tmp_path):
    bare = executable(tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with pytest.raises(
        StackError, match="torch cannot be imported.*No module named 'torch'.*install torch first"
    ):
        probe(bare)


@pytest.mark.parametrize(
    ("gpus", "force_cuda", "variables", "cuda", "architectures"),
    [
        ((), None, {}, None, ()),
        (("9.0",), None, {}, "13.0", ("9.0",)),
        (("8.0", "9.0"), None, {}, "13.0", ("8.0", "9.0")),
        (("9.0",), False, {}, None, ()),
        (("9.0",), None, {"FORCE_CUDA": "0"}, None, ()),
        ((), True, {}, "13.0", tuple(DEFAULT_ARCHITECTURES.split(";"))),
        ((), None, {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.6 9.0"}, "13.0", ("8.6", "9.0")),
        ((), False, {"FORCE_CUDA": "1"}, None, ()),
    ],
)
def test_cuda_is_built_where_there_is_a_gpu_or_it_is_asked_for(
    tmp_path, gpus, force_cuda, variables, cuda, architectures
):
    target = choose_target(environment(tmp_path, gpus=gpus), force_cuda, variables)
    assert (target.cuda, target.architectures) == (cuda, architectures)


def test_cuda_ops_for_a_cpu_build_of_torch_are_refused(tmp_path):
    with pytest.raises(StackError, match="build without CUDA.*FORCE_CUDA=0"):
        choose_target(environment(tmp_path, torch_cuda=None, torch="2.14.1+cpu"), True, {})


def test_key_names_all_that_makes_wheels_differ():
    assert CPU.key == "mmcv2.1.0-torch2.14.1+cu130-cpu-cp311-linux_x86_64"
    assert CUDA.key == "mmcv2.1.0-torch2.11.0+cu130-cu130-sm90-cp312-linux_x86_64"
    others = [
        replace(CUDA, torch="2.11.0+cu128"),
        replace(CUDA, cuda="12.8"),
        replace(CUDA, architectures=("8.0", "9.0+PTX")),
        replace(CUDA, python_tag="cp311"),
        replace(CUDA, platform="linux_aarch64"),
    ]
    assert len({CUDA.key, *(other.key for other in others)}) == 6
    assert all("/" not in target.key and " " not in target.key for target in others)


def test_compiler_is_found_on_path(tmp_path):
    compiler = executable(tmp_path / "bin" / "clang++")
    assert find_compiler(environment(tmp_path), {"PATH": str(tmp_path / "bin")}) == str(compiler)


def test_missing_compiler_is_told_with_the_mend(tmp_path):
    with pytest.raises(StackError, match="no C\\+\\+ compiler was found.*apt-get install g\\+\\+"):
        find_compiler(environment(tmp_path), {"PATH": str(tmp_path)})
    with pytest.raises(StackError, match="CXX=icpx is not there"):
        find_compiler(environment(tmp_path), {"PATH": str(tmp_path), "CXX": "icpx"})


def test_missing_python_headers_are_told_with_the_mend(tmp_path):
    executable(tmp_path / "g++")
    bare = environment(tmp_path, python_header=str(tmp_path / "include" / "Python.h"))
    with pytest.raises(StackError, match="Python.h: Python's C headers are missing.*python3-dev"):
        find_compiler(bare, {"PATH": str(tmp_path)})


def toolkit(folder, version):
    """A folder with what is looked for in a CUDA toolkit."""
    told = f"Cuda compilation tools, release {version}, V{version}.88"
    executable(folder / "bin" / "nvcc", f'#!/bin/sh\necho "{told}"\n')
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").write_text("", encoding="utf-8")
    return folder


def test_toolkit_by_variable_path_and_usual_place(tmp_path):
    toolkit(tmp_path / "cuda-13.2", "13.2")
    toolkit(tmp_path / "usual" / "cuda-13.0", "13.0")
    by_variable = {"CUDA_HOME": str(tmp_path / "cuda-13.2"), "PATH": ""}
    by_path = {"PATH": str(tmp_path / "cuda-13.2" / "bin")}
    assert find_toolkit(CUDA, by_variable, tmp_path / "usual") == tmp_path / "cuda-13.2"
    assert find_toolkit(CUDA, by_path, tmp_path / "usual") == tmp_path / "cuda-13.2"
    assert find_toolkit(CUDA, {"PATH": ""}, tmp_path / "usual") == tmp_path / "usual" / "cuda-13.0"


def test_script_that_calls_nvcc_is_no_toolkit(tmp_path):
    real = toolkit(tmp_path / "usual" / "cuda", "13.0")
    executable(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    assert find_toolkit(CUDA, {"PATH": str(tmp_path / "bin")}, tmp_path / "usual") == real


def test_fitting_toolkit_is_preferred_to_the_one_on_path(tmp_path):
    toolkit(tmp_path / "old", "12.8")
    fitting = toolkit(tmp_path / "usual" / "cuda-13.0", "13.0")
    assert find_toolkit(CUDA, {"PATH": str(tmp_path / "old" / "bin")}, tmp_path / "usual") == fitting


@pytest.mark.parametrize("name", ["PATH", "CUDA_HOME"])
def test_toolkit_of_another_major_version_is_told_with_the_mend(tmp_path, name):
    folder = toolkit(tmp_path / "old", "12.8")
    variables = {"PATH": "", name: str(folder / "bin" if name == "PATH" else folder)}
    with pytest.raises(StackError, match="is of CUDA 12.8.*needs CUDA toolkit 13.0.*CUDA_HOME.*FORCE_CUDA=0"):
        find_toolkit(CUDA, variables, tmp_path)


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"PATH": "", "CUDA_HOME": "/nowhere"}])
def test_missing_toolkit_is_told_with_the_mend(variables, tmp_path):
    with pytest.raises(StackError, match="nvcc.*needs CUDA toolkit 13.0.*CUDA_HOME"):
        find_toolkit(CUDA, variables, tmp_path)
