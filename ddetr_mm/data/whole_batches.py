"""Sharing an evaluation among ranks by whole batches, so that results do not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
import numpy.typing as npt
from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler


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
            models whose forward pass is itself a joint action of all ranks (FSDP). Whoever collects the
            results must count a repeated sample once.
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
        # A rank that lacks a batch has no short one: what it repeats is whole, unless all there is is short.
        batches += [rank % num_batches] * (-(-num_batches // world_size) - len(batches))
    parts = [np.arange(batch * batch_size, min((batch + 1) * batch_size, num_samples)) for batch in batches]
    return np.concatenate([np.zeros(0, np.int64), *parts])
