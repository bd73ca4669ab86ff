"""Randomness of one sample's augmentation, from the seed, the epoch and the sample's index alone.

A sampler yields :class:`SampleIndex`, an integer that knows its seed and epoch. It travels to wherever the
sample is made, be it this process or a worker that lives through all epochs, and there
:func:`sample_randomness` seeds the generators that transforms draw from.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class SampleIndex(int):
    """The index of a sample, with what its randomness depends on.

    Arithmetic gives plain integers: a wrapper that computes a new index (``ConcatDataset``) makes its
    samples depend on the worker again.

    Attributes:
        seed: of the run.
        epoch: from 0.
        is_filler: whether the sample only fills the last step of a rank that has none left; it must not
            count.
    """

    seed: int
    epoch: int
    is_filler: bool

    def __new__(cls, index: int, seed: int, epoch: int, is_filler: bool = False) -> SampleIndex:
        """Make one; see the class."""
        self = super().__new__(cls, index)
        self.seed = seed
        self.epoch = epoch
        self.is_filler = is_filler
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndex, (int(self), self.seed, self.epoch, self.is_filler)


@contextmanager
def sample_randomness(index: int) -> Iterator[None]:
    """Seed ``random``, numpy's and torch's CPU generators for one sample; put them back after it.

    Putting them back keeps what the process draws otherwise (dropout) independent of whether it makes
    samples itself or workers do.

    Args:
        index: a :class:`SampleIndex`; a plain integer leaves the generators alone.
    """
    if not isinstance(index, SampleIndex):
        yield
        return
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([index.seed, index.epoch, int(index)]).generate_state(8)
    try:
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:6])
        # not torch.manual_seed, which would seed the GPUs too
        torch.default_generator.manual_seed(int(words[6]) << 31 | int(words[7]) >> 1)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
