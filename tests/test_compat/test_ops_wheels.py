from dataclasses import replace
from pathlib import Path

import pytest
from ops_targets import CPU, CUDA

from ddetr_mm.compat import install_ops
from ddetr_mm.compat.install_ops import candidates, folder_fit
from ddetr_mm.errors import StackError

SHARED_WHEELS = Path(__file__).resolve().parents[3] / "shared" / "wheels"


@pytest.fixture(autouse=True)
def away_from_the_checkout(request, tmp_path, monkeypatch):
    """Let the module look for ``../shared/wheels`` from elsewhere, unless the test wants the real one."""
    if "beside_the_checkout" not in request.node.name:
        monkeypatch.setattr(install_ops, "__file__", str(tmp_path / "a" / "b" / "c" / "module.py"))


def wheel(folder, python_tag="cp311", version="2.1.0"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mmcv-{version}-{python_tag}-{python_tag}-linux_x86_64.whl"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("name", "target", "fit"),
    [
        ("torch2.14.1-cpu", CPU, 2),
        ("torch2.14.1-cu130-sm90", CPU, 1),
        ("torch2.11.0-cpu", CPU, 0),
        ("torch2.14.1", CPU, 0),
        ("torch2.11.0-cu130-sm90", CUDA, 2),
        ("torch2.11.0-cu130-sm80-sm90", CUDA, 2),
        ("torch2.11.0-cu130-sm80", CUDA, 0),
        ("torch2.11.0-cu128-sm90", CUDA, 0),
        ("torch2.11.0-cpu", CUDA, 0),
        ("torch2.11.0-cu130-sm90", replace(CUDA, architectures=("8.0", "9.0")), 0),
    ],
)
def test_folder_names_tell_what_fits(name, target, fit):
    assert folder_fit(name, target) == fit


def test_order_is_the_users_folder_then_the_cache(tmp_path):
    variables = {"DDETR_MM_WHEELS": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    cached = wheel(tmp_path / "cache" / "ddetr_mm" / "wheels" / CPU.key)
    fitting = wheel(tmp_path / "mine" / "torch2.14.1-cpu")
    with_cuda = wheel(tmp_path / "mine" / "torch2.14.1-cu130-sm90")
    unnamed = wheel(tmp_path / "mine")
    wheel(tmp_path / "mine" / "torch2.11.0-cpu")
    wheel(tmp_path / "mine" / "torch2.14.1-cpu", python_tag="cp312")
    wheel(tmp_path / "mine" / "torch2.14.1-cpu", version="2.0.1")
    assert list(candidates(CPU, variables)) == [unnamed, fitting, with_cuda, cached]


def test_variable_may_name_one_wheel(tmp_path):
    path = wheel(tmp_path)
    assert list(candidates(CPU, {"DDETR_MM_WHEELS": str(path), "XDG_CACHE_HOME": str(tmp_path)})) == [path]


def test_variable_that_names_nothing_is_an_error(tmp_path):
    with pytest.raises(StackError, match="DDETR_MM_WHEELS: does not exist"):
        list(candidates(CPU, {"DDETR_MM_WHEELS": str(tmp_path / "gone")}))


@pytest.mark.skipif(not SHARED_WHEELS.is_dir(), reason="no prebuilt wheels beside this checkout")
@pytest.mark.parametrize("target", [CPU, CUDA], ids=["cpu", "cuda"])
def test_wheels_beside_the_checkout_are_found(target, tmp_path):
    found = list(candidates(target, {"XDG_CACHE_HOME": str(tmp_path)}))
    assert [path.parent.parent for path in found] == [SHARED_WHEELS]
    assert target.python_tag in found[0].name
