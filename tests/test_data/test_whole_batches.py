"""Evaluation shared among ranks: whole batches, each sample once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.data.whole_batches import WholeBatchSampler, rank_indices


def batches(indices: np.ndarray, batch_size: int) -> list[tuple[int, ...]]:
    return [
        tuple(indices[start : start + batch_size].tolist()) for start in range(0, len(indices), batch_size)
    ]


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_every_batch_of_one_process_goes_to_one_rank(num_samples: int, batch_size: int, world_size: int):
    alone = batches(np.arange(num_samples), batch_size)
    shared = [
        batch
        for rank in range(world_size)
        for batch in batches(rank_indices(num_samples, batch_size, rank, world_size), batch_size)
    ]
    assert sorted(shared) == alone


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_equal_length_repeats_whole_batches_only(num_samples: int, batch_size: int, world_size: int):
    alone = batches(np.arange(num_samples), batch_size)
    ranks = [
        batches(rank_indices(num_samples, batch_size, rank, world_size, equal_length=True), batch_size)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert {batch for rank in ranks for batch in rank} == set(alone)


@pytest.mark.parametrize("equal_length", [False, True])
def test_one_process_sees_the_data_set_in_its_order(equal_length: bool):
    sampler = WholeBatchSampler(range(7), batch_size=3, equal_length=equal_length)
    assert list(sampler) == list(range(7)) and len(sampler) == 7
