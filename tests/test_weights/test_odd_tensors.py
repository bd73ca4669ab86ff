"""Tensors that are no weights: one message that names them, in a detector and in a backbone."""

from __future__ import annotations

import pytest
import torch
from weights_builders import small_canonical, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import read_checkpoint
from ddetr_mm.weights.entries import tensor_entries
from ddetr_mm.weights.safe_read import read_raw

KEY = "bbox_head.reg_branches.0.0.weight"

ODD = {
    "single number": (lambda value: torch.tensor(1.0), "a single number"),
    "empty": (lambda value: value[:0], "empty"),
    "whole numbers": (lambda value: torch.ones_like(value, dtype=torch.int32), "int32"),
    "truth values": (lambda value: value > 0, "bool"),
    "complex": (lambda value: value.to(torch.complex64), "complex64"),
    "conjugate": (lambda value: value.to(torch.complex64).conj(), "complex64"),
    "float8": (lambda value: value.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "sparse": (lambda value: value.to_sparse(), "sparse"),
    "meta": (lambda value: value.to("meta"), "without values|meta"),
    "nested": (
        lambda value: torch.nested.nested_tensor([value, value[:2]]),
        "nested|whole pickled|not a plain",
    ),
    "strides of 0": (lambda value: value[:1].expand(10**6, -1), "claims|single"),
    "nan": (lambda value: value * float("nan"), "NaN"),
    "infinite": (lambda value: value / 0, "NaN or infinite"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_odd_tensor_of_the_network_is_refused(name, tmp_path):
    change, words = ODD[name]
    state_dict = small_canonical()
    state_dict[KEY] = change(state_dict[KEY])
    path = write_mmdet(tmp_path / "x.pth", state_dict)
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(path)


def test_half_precision_and_counters_are_read(tmp_path):
    state_dict = {
        key: value.half() if value.is_floating_point() else value for key, value in small_canonical().items()
    }
    found = read_checkpoint(write_mmdet(tmp_path / "x.pth", state_dict))
    assert found.state_dict[KEY].dtype is torch.float16


def test_other_tensors_of_a_file_do_not_matter(tmp_path):
    state_dict = {**small_canonical(), "best_score": torch.tensor(0.5), "flags": torch.tensor([True])}
    state_dict |= {"spectrum": torch.ones(2, dtype=torch.complex64), "sparse": torch.eye(2).to_sparse()}
    path = write_mmdet(tmp_path / "x.pth", state_dict)
    assert tensor_entries(read_raw(path))
    assert KEY in read_checkpoint(path).state_dict
