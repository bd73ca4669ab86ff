import argparse
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from ddetr_mm.compat.patches import safe_globals

pytestmark = pytest.mark.usefixtures("kept_safe_globals")


def reload(value, path):
    torch.save(value, path)
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)


def test_log_history_of_mmengine_comes_back(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        history.update(value)
    again = reload({"loss": history}, tmp_path / "a.pth")["loss"]
    assert again.mean() == 3.0
    assert again.statistics("max") == 6.0
    assert again.data[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["?", "i1", "u2", "i4", "i8", "f2", "f4", "f8"])
def test_numpy_arrays_and_scalars_come_back(kind, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(kind)
    again = reload({"array": array, "scalar": array[1, 2]}, tmp_path / "a.pth")
    assert again["array"].dtype == array.dtype and (again["array"] == array).all()
    assert again["scalar"] == array[1, 2] and type(again["scalar"]) is type(array[1, 2])


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2_are_known_by_their_names(module):
    names = {entry[1] for entry in safe_globals() if isinstance(entry, tuple)}
    assert {f"{module}._reconstruct", f"{module}.scalar"} <= names


def test_arguments_of_the_first_release_come_back(tmp_path):
    assert reload(argparse.Namespace(num_queries=300), tmp_path / "a.pth").num_queries == 300


class Reaching:
    """Pickles as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.parts = (owner, name)

    def __reduce__(self):
        return getattr, self.parts


@pytest.mark.parametrize(
    ("owner", "name"), [(HistoryBuffer, "__init__"), (HistoryBuffer, "__reduce__"), (np.ndarray, "tofile")]
)
def test_other_attributes_are_refused(owner, name, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        reload(Reaching(owner, name), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "value", [np.array([{}], dtype=object), print, pickle.loads], ids=["objects", "print", "loads"]
)
def test_what_is_no_data_is_refused(value, tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        reload(value, tmp_path / "a.pth")
