import copy
import pickle
import random

import numpy as np
import torch

from ddetr_mm.data.sample_rng import SampleIndex, sample_randomness


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
    index = SampleIndex(7, seed=1, epoch=2, is_filler=True)
    for copied in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert isinstance(copied, SampleIndex) and copied == 7
        assert (copied.seed, copied.epoch, copied.is_filler) == (1, 2, True)
