"""In which order the samples of an epoch come, and which of them a rank takes: pure functions over arrays.

The order depends on the seed and the epoch alone. Ranks take turns in it, so that the samples of one step,
all ranks together, are the next ones of the order however many ranks there are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int32]

UNEVEN_SHARDS = ("repeat", "drop")


def epoch_order(num_samples: int, seed: int, epoch: int, *, shuffle: bool = True) -> Indices:
    """Every sample once.

    numpy promises that its ``RandomState`` gives the same numbers in every version, which it does not of
    its newer generators: a run may be resumed after an update.

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


def turns_of_rank(order: Indices, rank: int, num_ranks: int, samples_done: int = 0) -> Indices:
    """The samples of one rank: every ``num_ranks``-th of the order, from a position on.

    Args:
        order: what :func:`epoch_order` gives.
        rank: from 0.
        num_ranks: how many take turns.
        samples_done: samples at the order's beginning that are already trained on, by all ranks together.

    Returns:
        A copy, so that the whole order need not stay in memory.
    """
    return order[samples_done + rank :: num_ranks].copy()


def largest_turn(num_samples: int, num_ranks: int) -> int:
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
        uneven: what is done so that all ranks take equally many: ``"repeat"``, ranks with fewer begin anew
            (every sample is seen); ``"drop"``, each takes as many as the smallest has (none is seen twice;
            which are left out changes with the epoch).
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
    # A byte an image, read at random, takes half the time of shard numbers read so.
    is_own_shard = np.arange(shard_indices.max(initial=0) + 1) % num_ranks == rank
    own = order[is_own_shard[shard_indices][order]]
    if not sizes.min():
        return own[:0]
    return own[: sizes.min()] if uneven == "drop" else np.resize(own, sizes.max())
