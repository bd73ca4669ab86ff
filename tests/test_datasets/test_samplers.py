"""Samplers: the same samples and the same augmentation on any number of ranks."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_builders import coco, image, write_images, write_json
from dataset_builders import build
from hypothesis import given
from hypothesis import strategies as st
from mmengine.runner import Runner

from ddetr_mm.datasets.samplers import (
    ElasticBatchSampler,
    ElasticDistributedSampler,
    SampleIndex,
    ShardDistributedSampler,
    WholeBatchSampler,
    epoch_order,
    rank_indices,
    sample_randomness,
    samples_of_rank,
    shards_of_rank,
)
from ddetr_mm.errors import DataError

# --- randomness of a sample, and training samplers in data loaders ---

AUGMENTED = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "TAORandomResize", "scales": [24, 28, 32, 36], "max_size": 64},
    {"type": "TAORandomSizeCrop", "min_size": 8, "max_size": 24},
    {"type": "PhotoMetricDistortion"},
    {"type": "PackDetInputs"},
]


def batches(num_samples, num_ranks, batch_size, *, seed=3, epoch=0, done=0, drop_last=False):
    """Every rank's batches."""
    found = []
    for rank in range(num_ranks):
        sampler = ElasticDistributedSampler(range(num_samples), seed=seed, rank=rank, num_ranks=num_ranks)
        sampler.set_epoch(epoch)
        sampler.seek(done)
        found.append(list(ElasticBatchSampler(sampler, batch_size, drop_last)))
    return found


def union(steps):
    """The real samples of one step, all ranks together, in the global order."""
    longest = max(map(len, steps))
    turns = [step[turn] for turn in range(longest) for step in steps if turn < len(step)]
    return [int(index) for index in turns if not index.is_filler]


@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 5))
def test_steps_of_all_ranks_are_the_steps_of_one(num_samples: int, num_ranks: int, batch_size: int):
    one = batches(num_samples, 1, num_ranks * batch_size)[0]
    many = batches(num_samples, num_ranks, batch_size)
    assert {len(rank) for rank in many} == {len(one)}
    assert [union(steps) for steps in zip(*many, strict=True)] == [list(map(int, step)) for step in one]
    assert sorted(index for step in one for index in step) == list(range(num_samples))
    fillers = [index for rank in many for step in rank[:-1] for index in step if index.is_filler]
    assert not fillers  # only in the last step
    assert all(len(rank[-1]) == 1 for rank in many if rank[-1][0].is_filler)


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 4), st.integers(0, 70), st.integers(1, 4))
def test_continues_anywhere_on_another_number_of_ranks(num_samples, ranks, batch_size, steps, later_ranks):
    sampler = ElasticDistributedSampler(range(num_samples), seed=3, rank=0, num_ranks=ranks)
    done = ElasticBatchSampler(sampler, batch_size).samples_after(0, steps)
    whole = [index for step in batches(num_samples, 1, 1)[0] for index in step]
    rest = batches(num_samples, later_ranks, batch_size, done=done)
    assert [index for step in zip(*rest, strict=True) for index in union(step)] == whole[done:]


@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 5))
def test_a_short_last_batch_is_dropped(num_samples: int, num_ranks: int, batch_size: int):
    """Whole steps only, the same on any number of ranks; a data set below one step is one short step."""
    step = num_ranks * batch_size
    one = batches(num_samples, 1, step, drop_last=True)[0]
    many = batches(num_samples, num_ranks, batch_size, drop_last=True)
    assert [union(steps) for steps in zip(*many, strict=True)] == [list(map(int, batch)) for batch in one]
    if num_samples >= step:
        assert len(one) == num_samples // step and {len(batch) for batch in one} == {step}
        assert not any(index.is_filler for rank in many for batch in rank for index in batch)
        assert {len(batch) for rank in many for batch in rank} == {batch_size}
    else:
        assert [sorted(batch) for batch in one] == [list(range(num_samples))]


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70))
def test_an_epoch_of_whole_batches_continues_anywhere(num_samples, ranks, batch_size, steps):
    sampler = ElasticDistributedSampler(range(num_samples), seed=3, rank=0, num_ranks=ranks)
    batch_sampler = ElasticBatchSampler(sampler, batch_size, drop_last=True)
    whole = list(zip(*batches(num_samples, ranks, batch_size, drop_last=True), strict=True))
    assert len(batch_sampler) == len(whole)
    steps = min(steps, len(whole))
    done = batch_sampler.samples_after(0, steps)
    assert batch_sampler.steps_left(done) == len(whole) - steps
    rest = batches(num_samples, ranks, batch_size, done=done, drop_last=True)
    assert list(zip(*rest, strict=True)) == whole[steps:]


def test_what_a_short_last_batch_drops_changes_with_the_epoch():
    seen = {
        int(index)
        for epoch in range(20)
        for batch in batches(7, 1, 4, epoch=epoch, drop_last=True)[0]
        for index in batch
    }
    assert seen == set(range(7))


def test_a_data_set_below_one_batch_is_reported(monkeypatch):
    logged = []
    monkeypatch.setattr("ddetr_mm.datasets.samplers.print_log", lambda text, *_: logged.append(text))
    for num_samples, drop_last in ((7, True), (8, True), (7, False)):
        sampler = ElasticDistributedSampler(range(num_samples), seed=0, rank=1, num_ranks=2)
        assert len(ElasticBatchSampler(sampler, 4, drop_last)) == 1
    assert logged == [
        "The data set is smaller than one batch of all ranks (7 of 8 images): each epoch is one step of all "
        "of it."
    ]


def test_length_is_that_of_the_whole_epoch_and_the_rest_is_reported():
    sampler = ElasticDistributedSampler(range(11), seed=0, rank=1, num_ranks=2)
    batch_sampler = ElasticBatchSampler(sampler, 2)
    sampler.seek(4)
    assert len(batch_sampler) == 3 and batch_sampler.steps_left(4) == 2 == len(list(batch_sampler))
    assert batch_sampler.samples_after(4, 1) == 8 and batch_sampler.samples_after(4, 2) == 11
    assert len(sampler) == 5
    with pytest.raises(ValueError, match="position 12 of 11"):
        sampler.seek(12)


def test_only_elastic_samplers_are_batched():
    with pytest.raises(TypeError, match="elastic"):
        ElasticBatchSampler(torch.utils.data.SequentialSampler(range(3)), 1)
    with pytest.raises(ValueError, match="at least 1"):
        ElasticBatchSampler(ElasticDistributedSampler(range(3), seed=0), 0)


class ShardedNumbers:
    """14 samples in four shards of 5, 3, 2 and 4."""

    shard_indices = np.array([0] * 5 + [1] * 3 + [2] * 2 + [3] * 4)

    def __len__(self):
        return 14


@pytest.mark.parametrize("uneven, num_ranks, steps, seen", [("repeat", 3, 5, 14), ("drop", 3, 1, 6)])
def test_shards_of_a_rank(uneven, num_ranks, steps, seen):
    indices = Counter()
    for rank in range(num_ranks):
        sampler = ShardDistributedSampler(
            ShardedNumbers(), uneven=uneven, seed=1, rank=rank, num_ranks=num_ranks
        )
        rank_steps = list(ElasticBatchSampler(sampler, 2))
        assert len(rank_steps) == steps
        own = [int(index) for step in rank_steps for index in step]
        assert set(ShardedNumbers.shard_indices[own] % num_ranks) == {rank}
        indices.update(own)
        sampler.seek(2 * num_ranks)
        assert list(ElasticBatchSampler(sampler, 2)) == rank_steps[1:]
    assert len(indices) == seen


UNEVEN = np.repeat(np.arange(6), [400, 10, 100, 10, 50, 10])  # of two ranks: 400, 100, 50; and 3 times 10


class UnevenShards:
    shard_indices = UNEVEN

    def __len__(self):
        return len(UNEVEN)


def drawing(rank: int, epoch: int = 0, **options) -> ShardDistributedSampler:
    """The sampler of ``uniform_sampler`` on one of two ranks."""
    sampler = ShardDistributedSampler(
        UnevenShards(), uneven="drop", replacement=True, seed=1, rank=rank, num_ranks=2, **options
    )
    sampler.set_epoch(epoch)
    return sampler


def test_uniform_draws_the_shards_of_a_rank_evenly_with_replacement():
    drawn = Counter()
    for epoch in range(200):
        samples = [int(index) for index in drawing(0, epoch)]
        assert len(samples) == len(drawing(0)) == 30  # what the smallest rank has
        drawn.update(UNEVEN[samples].tolist())
    assert set(drawn) == {0, 2, 4}
    assert all(abs(count / 6000 - 1 / 3) < 0.03 for count in drawn.values())
    repeated = [Counter(map(int, drawing(1, epoch))) for epoch in range(20)]
    assert any(max(one.values()) > 1 for one in repeated)
    assert set().union(*repeated) == set(np.flatnonzero(UNEVEN % 2).tolist())


def test_draws_depend_on_seed_epoch_and_rank_and_continue_anywhere():
    whole = [int(index) for index in drawing(0, 3)]
    assert whole == [int(index) for index in drawing(0, 3)] != [int(index) for index in drawing(0, 4)]
    sampler = drawing(0, 3)
    sampler.seek(2 * 7)
    assert [int(index) for index in sampler] == whole[7:]


def test_repeats_of_an_epoch_are_augmented_otherwise():
    whole = list(drawing(1))
    seen: Counter = Counter()
    for index in whole:
        assert index.repeat == seen[int(index)]
        seen[int(index)] += 1
    twice = [index for index in whole if int(index) == seen.most_common(1)[0][0]][:2]
    assert draw(twice[0]) != draw(twice[1]) and draw(twice[0]) == draw(SampleIndex(twice[0], 1, 0))
    sampler = drawing(1)
    sampler.seek(2 * 20)
    assert [index.repeat for index in sampler] == [index.repeat for index in whole[20:]]


def test_non_uniform_repeats_nothing():
    for rank in range(2):
        sampler = ShardDistributedSampler(UnevenShards(), uneven="drop", seed=1, rank=rank, num_ranks=2)
        samples = list(sampler)
        assert len(samples) == len(set(samples)) == 30 and not any(index.repeat for index in samples)


def test_one_process_takes_every_sample_once():
    sampler = ShardDistributedSampler(UnevenShards(), replacement=True, seed=1, rank=0, num_ranks=1)
    assert sorted(map(int, sampler)) == list(range(len(UNEVEN)))


def test_too_few_shards_are_reported():
    with pytest.raises(DataError, match=r"4 shards are too few for 5 processes"):
        ShardDistributedSampler(ShardedNumbers(), seed=1, rank=0, num_ranks=5)


@pytest.fixture(scope="module")
def noisy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images with one object each."""
    from data_builders import box

    root = tmp_path_factory.mktemp("noisy")
    document = coco(
        [image(number) for number in range(1, 12)],
        [box(number, number, [2, 2, 12, 12], 1) for number in range(1, 12)],
    )
    write_json(root / "a.json", document)
    write_images(root / "a", document)
    return root


def loader(root: Path, num_workers: int, batch_size: int, rank: int, num_ranks: int):
    """A training loader as a Runner builds it."""
    from dataset_builders import config

    return Runner.build_dataloader(
        dict(
            dataset=config(root, pipeline=AUGMENTED),
            sampler=dict(type="ElasticDistributedSampler", rank=rank, num_ranks=num_ranks),
            batch_sampler=dict(type="ElasticBatchSampler"),
            batch_size=batch_size,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        ),
        seed=21,
    )


def augmented_epochs(root: Path, num_ranks: int, num_workers: int) -> list[list[list[tuple]]]:
    """Two epochs, each a list of steps, each what all ranks got: digest and boxes of every real sample."""
    build(root)  # the default scope
    epochs: list = [[], []]
    for rank in range(num_ranks):
        data = loader(root, num_workers, 4 // num_ranks, rank, num_ranks)
        for epoch, steps in enumerate(epochs):
            data.batch_sampler.sampler.set_epoch(epoch)
            for number, batch in enumerate(data):
                if len(steps) <= number:
                    steps.append([])
                steps[number] += [
                    (hash(inputs.numpy().tobytes()), str(sample.gt_instances.bboxes.tensor.tolist()))
                    for inputs, sample in zip(batch["inputs"], batch["data_samples"], strict=True)
                    if not sample.metainfo.get("is_filler")
                ]
    return [[sorted(step) for step in epoch] for epoch in epochs]


def test_augmented_samples_do_not_depend_on_ranks_and_workers(noisy_root: Path):
    alone = augmented_epochs(noisy_root, num_ranks=1, num_workers=0)
    assert [len(step) for step in alone[0]] == [4, 4, 3]
    assert len({sample for epoch in alone for step in epoch for sample in step}) == 22  # all differ
    assert augmented_epochs(noisy_root, num_ranks=1, num_workers=4) == alone
    assert augmented_epochs(noisy_root, num_ranks=2, num_workers=2) == alone
    assert augmented_epochs(noisy_root, num_ranks=4, num_workers=0) == alone


def test_a_filler_has_no_objects_and_is_marked(noisy_root: Path):
    build(noisy_root)
    last = list(loader(noisy_root, 0, 1, rank=3, num_ranks=4))[-1]
    (sample,) = last["data_samples"]
    assert sample.metainfo["is_filler"] and len(sample.gt_instances) == 0


# --- order of an epoch ---


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
    shares = [samples_of_rank(order, rank, num_ranks, done) for rank in range(num_ranks)]
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
        part = samples_of_rank(order, rank, 1024)
        seen[part] += 1
        sizes.add(len(part))
    assert (seen == 1).all() and sizes == {19_531, 19_532}


# --- draws of one sample ---


def draw(index: int) -> tuple:
    with sample_randomness(index):
        return random.random(), np.random.random(), torch.rand(1).item()


def test_draws_depend_on_seed_epoch_and_index_alone():
    keys = [SampleIndex(3, 1, 0), SampleIndex(4, 1, 0), SampleIndex(3, 2, 0), SampleIndex(3, 1, 1)]
    draws = [draw(key) for key in keys]
    assert all(len({one[source] for one in draws}) == 4 for source in range(3))
    np.random.seed(99)
    torch.manual_seed(99)
    assert draw(keys[0]) == draws[0]


def test_the_process_draws_on_as_if_nothing_had_happened():
    def three():
        return random.random(), np.random.normal(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [three(), three()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = three()
    draw(SampleIndex(0, 0, 0))
    assert [first, three()] == expected


def test_a_plain_index_leaves_the_generators_alone():
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    assert draw(5)[1] == expected


def test_an_index_travels_whole():
    index = SampleIndex(7, seed=1, epoch=2, is_filler=True, repeat=3)
    for copied in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert isinstance(copied, SampleIndex) and copied == 7
        assert (copied.seed, copied.epoch, copied.is_filler, copied.repeat) == (1, 2, True, 3)


# --- evaluation: whole batches, each sample once ---


def rank_batches(indices: np.ndarray, batch_size: int) -> list[tuple[int, ...]]:
    return [
        tuple(indices[start : start + batch_size].tolist()) for start in range(0, len(indices), batch_size)
    ]


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_every_batch_of_one_process_goes_to_one_rank(num_samples: int, batch_size: int, world_size: int):
    alone = rank_batches(np.arange(num_samples), batch_size)
    shared = [
        batch
        for rank in range(world_size)
        for batch in rank_batches(rank_indices(num_samples, batch_size, rank, world_size), batch_size)
    ]
    assert sorted(shared) == alone


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_equal_length_repeats_whole_batches_only(num_samples: int, batch_size: int, world_size: int):
    alone = rank_batches(np.arange(num_samples), batch_size)
    ranks = [
        rank_batches(rank_indices(num_samples, batch_size, rank, world_size, equal_length=True), batch_size)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert {batch for rank in ranks for batch in rank} == set(alone)


@pytest.mark.parametrize("equal_length", [False, True])
def test_one_process_sees_the_data_set_in_its_order(equal_length: bool):
    sampler = WholeBatchSampler(range(7), batch_size=3, equal_length=equal_length)
    assert list(sampler) == list(range(7)) and len(sampler) == 7
