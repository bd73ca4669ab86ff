import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from ops_targets import CPU, CUDA, environment, executable

from ddetr_mm.compat import install_ops
from ddetr_mm.compat.install_ops import Workshop
from ddetr_mm.errors import StackError


@pytest.fixture
def workshop(tmp_path):
    (tmp_path / "work").mkdir()
    return Workshop(
        python=Path(sys.executable),
        environment=environment(tmp_path),
        target=CPU,
        folder=tmp_path / "work",
        installer=(sys.executable, "-c", "import sys; sys.exit('error: no route to the index')"),
        echo=lambda line: None,
    )


def torch_header(workshop, text):
    header = Path(workshop.environment.torch_folder) / "include/torch/csrc/api/include/torch/all.h"
    header.parent.mkdir(parents=True)
    header.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("#if !defined(_MSC_VER) && __cplusplus < 202002L\n#error C++20\n#endif\n", True),
        ("#if !defined(_MSC_VER) && __cplusplus < 201703L\n#error C++17\n#endif\n", False),
    ],
)
def test_torchs_header_tells_the_standard(workshop, text, needed):
    torch_header(workshop, text)
    assert install_ops.needs_cxx20(workshop.environment) is needed


def test_torch_without_headers_is_told(workshop):
    with pytest.raises(StackError, match="headers are missing"):
        install_ops.needs_cxx20(workshop.environment)


def test_standard_is_replaced_everywhere(tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text("a = ['-std=c++17']\nb = ['/std:c++17', '-std=c++14']  # c++17x\n", encoding="utf-8")
    assert install_ops.patch_standard(tmp_path) == 2
    assert (
        setup.read_text(encoding="utf-8")
        == "a = ['-std=c++20']\nb = ['/std:c++20', '-std=c++14']  # c++17x\n"
    )


def test_setup_that_sets_no_standard_is_refused(tmp_path):
    (tmp_path / "setup.py").write_text("", encoding="utf-8")
    with pytest.raises(StackError, match="not the mmcv this was made for"):
        install_ops.patch_standard(tmp_path)


def test_cpu_build_hides_gpus(workshop, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-march=x86-64-v3")
    variables = install_ops.build_variables(workshop, "/usr/bin/g++", None, workshop.folder / "tools", 3)
    assert variables["MMCV_WITH_OPS"] == "1"
    assert variables["FORCE_CUDA"] == "0"
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert variables["CFLAGS"] == "-march=x86-64-v3 -g0 -O2 -w"
    assert variables["MAX_JOBS"] == "3"
    assert variables["REAL_CXX"] == "/usr/bin/g++"
    assert os.access(variables["CXX"], os.X_OK)


def test_cuda_build_names_toolkit_architectures_and_pips_headers(workshop):
    headers = Path(workshop.environment.site_packages) / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    variables = install_ops.build_variables(
        replace(workshop, target=CUDA), "/usr/bin/g++", Path("/opt/cuda"), workshop.folder / "tools", 1
    )
    assert variables["FORCE_CUDA"] == "1"
    assert variables["CUDA_HOME"] == "/opt/cuda"
    assert variables["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert variables["CPATH"].split(os.pathsep)[0] == str(headers)
    assert variables.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_failed_download_of_the_tools_is_one_message(workshop):
    with pytest.raises(StackError) as caught:
        install_ops.install_tools(workshop, workshop.folder / "tools")
    assert "build tools" in str(caught.value)
    assert "no route to the index" in str(caught.value)
    assert "check the connection" in str(caught.value)


def test_failed_download_of_the_source_is_one_message(workshop):
    # -m pip finds this module in place of the real one.
    stand_in = workshop.folder / "pip.py"
    stand_in.write_text("import sys; sys.exit('ERROR: Could not find a version')", encoding="utf-8")
    with pytest.raises(StackError, match="source of mmcv 2.1.0 cannot be downloaded: ERROR: Could not find"):
        install_ops.unpack_source(workshop, {**os.environ, "PYTHONPATH": str(workshop.folder)})


def source_archive(folder):
    """A source distribution with a setup.py, and a ``pip`` module that 'downloads' it."""
    (folder / "setup.py").write_text("print('-std=c++17')\n", encoding="utf-8")
    archive = folder / "mmcv-2.1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder / "setup.py", "mmcv-2.1.0/setup.py")
    (folder / "pip.py").write_text(
        "import shutil, sys\n"
        f"shutil.copy({str(archive)!r}, sys.argv[sys.argv.index('--dest') + 1])\n"
        "assert '--no-build-isolation' in sys.argv and sys.argv[-1] == 'mmcv==2.1.0'\n",
        encoding="utf-8",
    )


def test_source_is_downloaded_by_pip_and_unpacked(workshop, tmp_path):
    source_archive(tmp_path)
    source = install_ops.unpack_source(workshop, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (source / "setup.py").read_text(encoding="utf-8") == "print('-std=c++17')\n"


def build_hook(folder, body):
    """A ``setuptools.build_meta`` whose ``build_wheel(destination)`` is ``body``."""
    package = folder / "hook" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "build_meta.py").write_text(f"def build_wheel(destination):\n    {body}\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(package.parent), "MAX_JOBS": "2"}


def test_wheel_and_log_land_in_the_destination(workshop, tmp_path):
    variables = build_hook(
        tmp_path, "open(destination + '/mmcv-2.1.0-x.whl', 'w').write('w'); print('[1/2] c++')"
    )
    wheel = install_ops.compile_wheel(workshop, tmp_path, variables, tmp_path / "cache")
    assert wheel == tmp_path / "cache" / "mmcv-2.1.0-x.whl"
    assert wheel.read_text(encoding="utf-8") == "w"
    assert "[1/2] c++" in (tmp_path / "cache" / "build.log").read_text(encoding="utf-8")


def test_failed_build_shows_the_first_error_and_names_the_log(workshop, tmp_path):
    variables = build_hook(tmp_path, "print('nms.cpp:3:1: error: no type'); raise SystemExit(1)")
    with pytest.raises(
        StackError, match="build.log: mmcv's ops did not compile: nms.cpp:3:1: error: no type"
    ):
        install_ops.compile_wheel(workshop, tmp_path, variables, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.log"]


def test_compiler_helper_precompiles_the_header_once(tmp_path):
    """A recording compiler stands for the real one."""
    compiler = executable(
        tmp_path / "c++",
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n',
    )
    header = tmp_path / "torch_header.hpp"
    header.write_text("", encoding="utf-8")
    helper = Path(install_ops.__file__).with_name("cxx_with_header.sh")
    variables = {**os.environ, "REAL_CXX": str(compiler), "TORCH_HEADER": str(header)}

    def call(*arguments):
        subprocess.run(["sh", str(helper), *arguments], env=variables, check=True)

    call("--version")
    flags = ["-O2", "-I/with space", "-std=c++20"]
    for name in ("a", "b"):
        call("-MMD", "-MF", f"{name}.o.d", *flags, "-c", f"{name}.cpp", "-o", str(tmp_path / f"{name}.o"))
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[0] == "--version"
    assert calls[1] == f"-O2 -I/with space -std=c++20 -x c++-header {header} -o {header}.part"
    assert calls[2].startswith(f"-include {header} -MMD") and calls[2].endswith(f"-c a.cpp -o {tmp_path}/a.o")
    assert calls[3].startswith(f"-include {header} -MMD") and calls[3].endswith(f"-c b.cpp -o {tmp_path}/b.o")
    assert len(calls) == 4
    assert Path(f"{header}.gch").exists()


def test_jobs_fit_cores_and_memory():
    assert 1 <= install_ops.default_jobs() <= (os.cpu_count() or 1)
