"""Samplers whose order depends on seed and epoch alone, and that start anywhere in an epoch.

:class:`ElasticDistributedSampler` deals out one global order; :class:`ShardDistributedSampler` gives each
rank shards of its own. Both go into :class:`ElasticBatchSampler`, which sees to it that all ranks make
equally many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from ddetr_mm.data.sample_order import (
    UNEVEN_SHARDS,
    Indices,
    epoch_order,
    largest_turn,
    shard_sizes,
    shards_of_rank,
    turns_of_rank,
)
from ddetr_mm.data.sample_rng import SampleIndex
from ddetr_mm.errors import DataError, Problem


@DATA_SAMPLERS.register_module()
class ElasticDistributedSampler(Sampler[int]):
    """Every sample once an epoch, in an order that does not depend on the number of ranks.

    The samples that the ranks take in one step are, together, the next ones of the order. Nothing is
    repeated and nothing left out: ranks differ by at most one sample.

    Yields :class:`~ddetr_mm.data.sample_rng.SampleIndex`, so that augmentation depends on the seed, the
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
        return largest_turn(self.samples_an_epoch - samples_done, self.num_ranks)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return max(0, -(-(self.samples_an_epoch - self.rank) // self.num_ranks))

    def indices(self) -> Indices:
        """This rank's samples from the position on."""
        order = epoch_order(len(self.dataset), self.seed, self.epoch, shuffle=self.shuffle)
        return turns_of_rank(order, self.rank, self.num_ranks, self.samples_done)

    def __iter__(self) -> Iterator[SampleIndex]:
        """This rank's samples from the position on."""
        seed, epoch = self.seed, self.epoch
        for index in self.indices():
            yield SampleIndex(int(index), seed, epoch)


@DATA_SAMPLERS.register_module()
class ShardDistributedSampler(ElasticDistributedSampler):
    """Each rank keeps to the shards (annotation files) i with i mod number of ranks = rank.

    With one rank it is :class:`ElasticDistributedSampler`. With several, the order of a rank's samples
    depends on seed and epoch, but which samples share a step depends on the number of ranks: resumed in
    mid-epoch on another number of ranks, an epoch may see some samples twice and leave some out.

    Args:
        dataset: a :class:`~ddetr_mm.data.dataset.SerializedCocoDataset`, for its ``shard_indices``.
        uneven: see :func:`~ddetr_mm.data.sample_order.shards_of_rank`.
        kwargs: as in :class:`ElasticDistributedSampler`.

    Raises:
        DataError: there are fewer shards with samples than ranks.
    """

    def __init__(self, dataset: Any, uneven: str = "repeat", **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        if uneven not in UNEVEN_SHARDS:
            raise ValueError(f"uneven must be one of {', '.join(UNEVEN_SHARDS)}, not {uneven!r}")
        self.uneven = uneven
        sizes = self._sizes = shard_sizes(dataset.shard_indices, self.num_ranks)
        if not sizes.min():
            num_shards = len(np.unique(dataset.shard_indices))
            raise DataError(
                Problem(
                    f"{num_shards} shards are too few for {self.num_ranks} processes",
                    mend="write at least one shard a process, or use the default sampler",
                )
            )
        self._samples_a_rank = int(sizes.min() if uneven == "drop" else sizes.max())

    @property
    def samples_an_epoch(self) -> int:
        """Samples that all ranks together take in an epoch, repeated ones included."""
        return self._samples_a_rank * self.num_ranks

    def indices(self) -> Indices:
        """This rank's samples from the position on."""
        order = epoch_order(len(self.dataset), self.seed, self.epoch, shuffle=self.shuffle)
        if self.num_ranks > 1:
            shards = self.dataset.shard_indices  # type: ignore[attr-defined]
            order = shards_of_rank(
                order, shards, self.rank, self.num_ranks, uneven=self.uneven, sizes=self._sizes
            )
        return order[self.samples_done // self.num_ranks :]


@DATA_SAMPLERS.register_module()
class ElasticBatchSampler(Sampler[list[int]]):
    """Batches of a sampler above; every rank makes as many steps as the one with most samples.

    A rank that has no sample left for the last step gets one that is marked as filler: the dataset takes
    its objects away and marks it, and :class:`~ddetr_mm.models.detector.TAODeformableDETR` gives it no
    weight in the loss. So each sample counts exactly once an epoch.

    Its length is that of a whole epoch, wherever the sampler's position is.

    Args:
        sampler: an :class:`ElasticDistributedSampler` or :class:`ShardDistributedSampler`.
        batch_size: samples a rank and step.
    """

    def __init__(self, sampler: ElasticDistributedSampler, batch_size: int) -> None:
        if not isinstance(sampler, ElasticDistributedSampler):
            raise TypeError(f"ElasticBatchSampler needs an elastic sampler, not {type(sampler).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.sampler = sampler
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on all ranks."""
        return self.steps_left(0)

    def steps_left(self, samples_done: int) -> int:
        """Steps from a position to the end of the epoch.

        Args:
            samples_done: see :meth:`ElasticDistributedSampler.seek`.
        """
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
