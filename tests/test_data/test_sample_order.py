import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.data.sample_order import epoch_order, shards_of_rank, turns_of_rank


def test_the_order_holds_every_sample_and_depends_on_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert epoch_order(50, 1, 0).tolist() == orders[0].tolist()
    assert epoch_order(5, 1, 0, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_the_order_is_the_same_in_every_version():
    assert epoch_order(12, seed=1234, epoch=3).tolist() == [8, 4, 1, 9, 5, 6, 2, 11, 10, 7, 0, 3]


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 60))
def test_ranks_share_the_rest_of_the_order(num_samples: int, num_ranks: int, done: int):
    order = epoch_order(num_samples, 5, 0)
    done = min(done, num_samples)
    shares = [turns_of_rank(order, rank, num_ranks, done) for rank in range(num_ranks)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(order[done:].tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


SHARDS = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3] * 4)  # of two ranks: 7 and 7; of three: 9, 3, 2


@pytest.mark.parametrize("num_ranks, sizes", [(1, [14]), (2, [7, 7]), (3, [9, 3, 2])])
def test_ranks_keep_to_their_shards(num_ranks, sizes):
    order = epoch_order(14, 0, 0)
    for rank, size in enumerate(sizes):
        kept = shards_of_rank(order, SHARDS, rank, num_ranks, uneven="repeat")
        assert len(kept) == max(sizes) and len(set(kept.tolist())) == size
        assert set(SHARDS[kept] % num_ranks) == {rank}
        dropped = shards_of_rank(order, SHARDS, rank, num_ranks, uneven="drop")
        assert len(dropped) == len(set(dropped.tolist())) == min(sizes)
        assert dropped.tolist() == kept[: min(sizes)].tolist()


def test_what_is_dropped_changes_with_the_epoch():
    shares = [shards_of_rank(epoch_order(14, 0, epoch), SHARDS, 0, 3, uneven="drop") for epoch in range(20)]
    assert set(np.concatenate(shares).tolist()) == set(np.flatnonzero(SHARDS % 3 == 0).tolist())


def test_a_rank_without_shards_gets_nothing():
    assert len(shards_of_rank(epoch_order(14, 0, 0), SHARDS, 0, 5, uneven="repeat")) == 0
    with pytest.raises(ValueError, match="repeat, drop"):
        shards_of_rank(epoch_order(14, 0, 0), SHARDS, 0, 2, uneven="pad")


def test_twenty_million_images_for_a_thousand_ranks():
    order = epoch_order(20_000_000, seed=1, epoch=0)
    seen = np.zeros(len(order), np.uint8)
    sizes = set()
    for rank in range(1024):
        part = turns_of_rank(order, rank, 1024)
        seen[part] += 1
        sizes.add(len(part))
    assert (seen == 1).all() and sizes == {19_531, 19_532}
