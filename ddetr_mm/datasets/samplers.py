"""Samplers, and randomness of augmentation, that depend on the seed and the epoch, not on the ranks.

For training, :class:`ElasticDistributedSampler` gives the ranks one global order, and
:class:`ShardDistributedSampler` gives each rank its own shards; both start anywhere in an epoch, and go into
:class:`ElasticBatchSampler`, which gives all ranks equally many steps. For evaluation,
:class:`WholeBatchSampler` gives each rank whole batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.logging import print_log
from torch.utils.data import Sampler

from ddetr_mm.errors import DataError, Problem

# --- Randomness of one sample ---
# A sampler yields :class:`SampleIndex`, an integer with its seed and epoch. In the process that makes the
# sample, :func:`sample_randomness` seeds the generators that transforms draw from.


class SampleIndex(int):
    """The index of a sample, with the seed and epoch of its augmentation.

    Arithmetic gives plain integers: a wrapper that computes a new index (``ConcatDataset``) makes its
    samples depend on the worker again.

    Attributes:
        seed: of the run.
        epoch: from 0.
        is_filler: whether the sample only fills the last step of a rank that has none left; it must not
            count.
        repeat: how often the sample came before in the epoch, so that each time it is augmented otherwise.
    """

    seed: int
    epoch: int
    is_filler: bool
    repeat: int

    def __new__(
        cls, index: int, seed: int, epoch: int, is_filler: bool = False, repeat: int = 0
    ) -> SampleIndex:
        """Make one; see the class."""
        self = super().__new__(cls, index)
        self.seed = seed
        self.epoch = epoch
        self.is_filler = is_filler
        self.repeat = repeat
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndex, (int(self), self.seed, self.epoch, self.is_filler, self.repeat)


@contextmanager
def sample_randomness(index: int) -> Iterator[None]:
    """Seed ``random``, numpy's and torch's CPU generators for one sample; restore them after it.

    So the process's other draws (dropout) do not depend on whether it makes samples itself or workers do.

    Args:
        index: a :class:`SampleIndex`; a plain integer leaves the generators alone.
    """
    if not isinstance(index, SampleIndex):
        yield
        return
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # The first time has the words that a run without repeats has.
    repeat = [index.repeat] if index.repeat else []
    words = np.random.SeedSequence([index.seed, index.epoch, int(index), *repeat]).generate_state(8)
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


# --- Order of an epoch ---
# Each of N ranks takes every N-th sample of the order, so that the samples of one step, all ranks together,
# are the next ones of the order however many ranks there are.

Indices = npt.NDArray[np.int32]

UNEVEN_SHARDS = ("repeat", "drop")


def epoch_order(num_samples: int, seed: int, epoch: int, *, shuffle: bool = True) -> Indices:
    """Every sample once.

    From ``RandomState``, whose numbers are the same in every version of numpy: a run may be resumed after an
    update.

    Args:
        num_samples: size of the data set, below 2**31.
        seed: at least 0.
        epoch: from 0.
        shuffle: without it the samples come as they are stored.

    Returns:
        (num_samples,) sample indices.
    """
    order = np.arange(num_samples, dtype=np.int32)
    if shuffle:
        source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
        source.shuffle(order)
    return order


def samples_of_rank(order: Indices, rank: int, num_ranks: int, samples_done: int = 0) -> Indices:
    """The samples of one rank: every ``num_ranks``-th of the order, from a position on.

    Args:
        order: what :func:`epoch_order` gives.
        rank: from 0.
        num_ranks: number of ranks.
        samples_done: samples at the order's beginning that are already trained on, by all ranks together.

    Returns:
        A copy, so that the whole order need not stay in memory.
    """
    return order[samples_done + rank :: num_ranks].copy()


def most_samples(num_samples: int, num_ranks: int) -> int:
    """How many samples the rank with most of them takes."""
    return -(-num_samples // num_ranks)


def shard_sizes(shard_indices: npt.NDArray[np.integer], num_ranks: int) -> npt.NDArray[np.int64]:
    """How many samples the shards of each rank hold.

    Args:
        shard_indices: (number of samples,) which shard each sample lies in, from 0.
        num_ranks: shard i belongs to rank i mod ``num_ranks``.

    Returns:
        (num_ranks,) counts.
    """
    by_shard = np.bincount(shard_indices)
    owners = np.arange(len(by_shard)) % num_ranks
    return np.bincount(owners, weights=by_shard, minlength=num_ranks).astype(np.int64)


def shards_of_rank(
    order: Indices,
    shard_indices: npt.NDArray[np.integer],
    rank: int,
    num_ranks: int,
    *,
    uneven: str,
    sizes: npt.NDArray[np.int64] | None = None,
) -> Indices:
    """The samples of one rank where each rank keeps to shards of its own, in the epoch's order.

    Args:
        order: what :func:`epoch_order` gives.
        shard_indices: (number of samples,) which shard each sample lies in.
        rank: from 0; it has the shards i with i mod ``num_ranks`` = rank.
        num_ranks: how many ranks there are.
        uneven: how all ranks get equally many: ``"repeat"``, ranks with fewer start again (every sample is
            seen); ``"drop"``, each takes as many as the smallest has (none is seen twice; the dropped ones
            change with the epoch).
        sizes: what :func:`shard_sizes` gives, where it is known already.

    Returns:
        Equally many for every rank; none where a rank has no shard at all and so cannot take part.

    Raises:
        ValueError: ``uneven`` is unknown.
    """
    if uneven not in UNEVEN_SHARDS:
        raise ValueError(f"uneven must be one of {', '.join(UNEVEN_SHARDS)}, not {uneven!r}")
    if sizes is None:
        sizes = shard_sizes(shard_indices, num_ranks)
    # Random access to one byte an image takes half the time of access to shard numbers.
    is_own_shard = np.arange(shard_indices.max(initial=0) + 1) % num_ranks == rank
    own = order[is_own_shard[shard_indices][order]]
    if not sizes.min():
        return own[:0]
    return own[: sizes.min()] if uneven == "drop" else np.resize(own, sizes.max())


def even_draws(
    shard_indices: npt.NDArray[np.integer], rank: int, num_ranks: int, count: int, *, seed: int, epoch: int
) -> Indices:
    """Samples of one rank's shards, drawn with replacement; each of its shards is equally likely.

    Args:
        shard_indices: (number of samples,) which shard each sample lies in.
        rank: from 0; it has the shards i with i mod ``num_ranks`` = rank.
        num_ranks: how many ranks there are.
        count: how many are drawn; the first of a longer draw are those of a shorter one.
        seed: at least 0.
        epoch: from 0.

    Returns:
        (count,) sample indices.
    """
    own = np.flatnonzero(shard_indices % num_ranks == rank)
    by_shard = own[np.argsort(shard_indices[own], kind="stable")]
    _, starts, sizes = np.unique(shard_indices[by_shard], return_index=True, return_counts=True)
    source = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch, rank])))
    shards, places = source.random_sample((count, 2)).T
    chosen = (shards * len(starts)).astype(np.int64)
    drawn: Indices = by_shard[starts[chosen] + (places * sizes[chosen]).astype(np.int64)].astype(np.int32)
    return drawn


def repeats_before(indices: Indices) -> Indices:
    """How often each sample came before in the list, (n,)."""
    by_sample = np.argsort(indices, kind="stable")
    in_order = indices[by_sample]
    is_first = np.concatenate([np.ones(min(1, len(in_order)), bool), in_order[1:] != in_order[:-1]])
    positions = np.arange(len(in_order))
    first = np.maximum.accumulate(np.where(is_first, positions, 0))
    counts = np.empty(len(indices), np.int32)
    counts[by_sample] = positions - first
    return counts


# --- Training ---


@DATA_SAMPLERS.register_module()
class ElasticDistributedSampler(Sampler[int]):
    """Every sample once an epoch, in an order that does not depend on the number of ranks.

    The samples that the ranks take in one step are, together, the next ones of the order. Nothing is
    repeated and nothing left out: ranks differ by at most one sample.

    Yields :class:`~ddetr_mm.datasets.samplers.SampleIndex`, so that augmentation depends on the seed, the
    epoch and the sample alone.

    Args:
        dataset: what has a length.
        shuffle: a new order every epoch; without it, the order of the data set.
        seed: at least 0; drawn once for all ranks when None.
        rank, num_ranks: by default those of the process group.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        group_rank, group_size = get_dist_info()
        self.rank = group_rank if rank is None else rank
        self.num_ranks = group_size if num_ranks is None else num_ranks
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.samples_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, for the next iteration."""
        self.epoch = epoch

    def seek(self, samples_done: int) -> None:
        """Begin the next iterations after so many samples of the epoch's order, all ranks together.

        Args:
            samples_done: from 0 to :attr:`samples_an_epoch`.

        Raises:
            ValueError: the position is outside the epoch.
        """
        if not 0 <= samples_done <= self.samples_an_epoch:
            raise ValueError(f"position {samples_done} of {self.samples_an_epoch} samples")
        self.samples_done = samples_done

    @property
    def samples_an_epoch(self) -> int:
        """Samples that all ranks together take in an epoch."""
        return len(self.dataset)

    def most_left(self, samples_done: int) -> int:
        """How many samples are left, at a position, for the rank with most of them."""
        return most_samples(self.samples_an_epoch - samples_done, self.num_ranks)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return max(0, -(-(self.samples_an_epoch - self.rank) // self.num_ranks))

    def indices(self) -> Indices:
        """This rank's samples from the position on."""
        order = epoch_order(len(self.dataset), self.seed, self.epoch, shuffle=self.shuffle)
        return samples_of_rank(order, self.rank, self.num_ranks, self.samples_done)

    def __iter__(self) -> Iterator[SampleIndex]:
        """This rank's samples from the position on."""
        seed, epoch = self.seed, self.epoch
        for index in self.indices():
            yield SampleIndex(int(index), seed, epoch)


@DATA_SAMPLERS.register_module()
class ShardDistributedSampler(ElasticDistributedSampler):
    """Each rank keeps to the shards (annotation files) i with i mod number of ranks = rank.

    A sample that comes several times in an epoch is augmented otherwise each time.

    With one rank it is :class:`ElasticDistributedSampler`. With several, the order of a rank's samples
    depends on seed and epoch, but which samples share a step depends on the number of ranks: resumed in
    mid-epoch on another number of ranks, an epoch may see some samples twice and leave some out.

    Args:
        dataset: a :class:`~ddetr_mm.datasets.coco.SerializedCocoDataset`, for its ``shard_indices``.
        uneven: see :func:`~ddetr_mm.datasets.samplers.shards_of_rank`.
        replacement: draw samples with replacement, each shard of a rank equally often, as many as
            ``uneven`` gives.
        kwargs: as in :class:`ElasticDistributedSampler`.

    Raises:
        DataError: there are fewer shards with samples than ranks.
    """

    def __init__(
        self, dataset: Any, uneven: str = "repeat", replacement: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.replacement = replacement
        if uneven not in UNEVEN_SHARDS:
            raise ValueError(f"uneven must be one of {', '.join(UNEVEN_SHARDS)}, not {uneven!r}")
        self.uneven = uneven
        sizes = self._sizes = shard_sizes(dataset.shard_indices, self.num_ranks)
        if not sizes.min():
            num_shards = len(np.unique(dataset.shard_indices))
            raise DataError(
                Problem(
                    f"{num_shards} shards are too few for {self.num_ranks} processes",
                    hint="write at least one shard a process, or use the default sampler",
                )
            )
        self._samples_a_rank = int(sizes.min() if uneven == "drop" else sizes.max())

    @property
    def samples_an_epoch(self) -> int:
        """Samples that all ranks together take in an epoch, repeated ones included."""
        return self._samples_a_rank * self.num_ranks

    def indices(self) -> Indices:
        """This rank's samples from the position on."""
        return self._epoch_indices()[self.samples_done // self.num_ranks :]

    def _epoch_indices(self) -> Indices:
        """This rank's samples of the whole epoch."""
        place = self.rank, self.num_ranks
        if self.num_ranks == 1:
            return epoch_order(len(self.dataset), self.seed, self.epoch, shuffle=self.shuffle)
        shards = self.dataset.shard_indices  # type: ignore[attr-defined]
        if self.replacement:
            return even_draws(shards, *place, self._samples_a_rank, seed=self.seed, epoch=self.epoch)
        order = epoch_order(len(self.dataset), self.seed, self.epoch, shuffle=self.shuffle)
        return shards_of_rank(order, shards, *place, uneven=self.uneven, sizes=self._sizes)

    def __iter__(self) -> Iterator[SampleIndex]:
        """This rank's samples from the position on."""
        seed, epoch, start = self.seed, self.epoch, self.samples_done // self.num_ranks
        indices = self._epoch_indices()
        for index, repeat in zip(indices[start:], repeats_before(indices)[start:], strict=True):
            yield SampleIndex(int(index), seed, epoch, repeat=int(repeat))


@DATA_SAMPLERS.register_module()
class ElasticBatchSampler(Sampler[list[int]]):
    """Batches of a sampler above; every rank makes equally many steps.

    With ``drop_last`` a step of all ranks together is whole, and what is left over at the end of an epoch is
    left out; only a data set that is smaller than one step has one short step.

    Otherwise the last step is short. A rank without a sample for it gets one that is marked as filler: the
    dataset removes its objects and marks it, and :class:`~ddetr_mm.models.detector.TAODeformableDETR` gives
    it no weight in the loss. So each sample counts exactly once an epoch.

    Its length is that of a whole epoch, wherever the sampler's position is.

    Args:
        sampler: an :class:`ElasticDistributedSampler` or :class:`ShardDistributedSampler`.
        batch_size: samples a rank and step.
        drop_last: leave out the samples that do not fill a step.
    """

    def __init__(self, sampler: ElasticDistributedSampler, batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(sampler, ElasticDistributedSampler):
            raise TypeError(f"ElasticBatchSampler needs an elastic sampler, not {type(sampler).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        in_epoch, in_step = sampler.samples_an_epoch, batch_size * sampler.num_ranks
        if drop_last and 0 < in_epoch < in_step:
            print_log(
                f"The data set is smaller than one batch of all ranks ({in_epoch} of {in_step} images): "
                "each epoch is one step of all of it.",
                "current",
            )

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on all ranks."""
        return self.steps_left(0)

    def steps_left(self, samples_done: int) -> int:
        """Steps from a position to the end of the epoch.

        Args:
            samples_done: see :meth:`ElasticDistributedSampler.seek`.
        """
        if self.drop_last:
            left = self.sampler.samples_an_epoch - samples_done
            whole = left // (self.batch_size * self.sampler.num_ranks)
            if whole or samples_done:
                return whole
        return -(-self.sampler.most_left(samples_done) // self.batch_size)

    def samples_after(self, samples_done: int, steps: int) -> int:
        """The position that a number of steps leads to, in samples of all ranks together."""
        taken = steps * self.batch_size * self.sampler.num_ranks
        return min(samples_done + taken, self.sampler.samples_an_epoch)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from the sampler's position to the end of the epoch."""
        samples = iter(self.sampler)
        for _ in range(self.steps_left(self.sampler.samples_done)):
            batch: list[int] = list(islice(samples, self.batch_size))
            if not batch:
                batch = [SampleIndex(0, self.sampler.seed, self.sampler.epoch, is_filler=True)]
            yield batch


# --- Evaluation ---


@DATA_SAMPLERS.register_module()
class WholeBatchSampler(Sampler[int]):
    """Gives every rank some of the batches that a single process would form, in order.

    A prediction can depend on its batch (the padding, the kernels chosen for its size). With the usual
    interleaving of samples another number of ranks makes other batches; here they stay the same, and so
    do the results, to the bit. Batch ``i`` goes to rank ``i mod N``; every sample is seen once.

    Args:
        dataset: anything with a length.
        batch_size: that of the data loader.
        equal_length: give every rank as many batches as the others, by repeating whole batches; for
            models whose forward pass needs all ranks (FSDP). A metric must count a repeated sample once.
        seed: accepted for mmengine, which passes one; nothing is random here.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, equal_length: bool = False, seed: int | None = None
    ) -> None:
        self.rank, self.world_size = get_dist_info()
        self.indices = rank_indices(len(dataset), batch_size, self.rank, self.world_size, equal_length)

    def __iter__(self) -> Iterator[int]:
        """Sample indices of this rank, batch after batch."""
        return iter(self.indices.tolist())

    def __len__(self) -> int:
        """Number of this rank's samples."""
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: all epochs are alike. mmengine calls it."""


def rank_indices(
    num_samples: int, batch_size: int, rank: int, world_size: int, equal_length: bool = False
) -> npt.NDArray[np.int64]:
    """The samples of one rank.

    Args:
        num_samples: of all ranks.
        batch_size: samples of a batch; the last batch may be smaller.
        rank: from 0.
        world_size: number of ranks.
        equal_length: see :class:`WholeBatchSampler`.

    Returns:
        (n,) indices; only the last batch of the last rank's share can be short, so that cutting the
        result into batches gives whole batches of the data set.
    """
    num_batches = -(-num_samples // batch_size)
    batches = list(range(rank, num_batches, world_size))
    if equal_length and num_batches:
        # Only the last batch may be short, and its rank never repeats one.
        batches += [rank % num_batches] * (-(-num_batches // world_size) - len(batches))
    parts = [np.arange(batch * batch_size, min((batch + 1) * batch_size, num_samples)) for batch in batches]
    return np.concatenate([np.zeros(0, np.int64), *parts])
