"""How much of the logged scalars' past a run keeps.

mmengine keeps the last million values of every scalar, in memory and in each checkpoint, and copies all of
them to add one: a long run grows, and slows down.
"""

from __future__ import annotations

from mmengine.logging import MessageHub

LEAST_KEPT = 1_000
"""Values of every scalar that are kept however short an epoch is; windows of the log are shorter."""

LOSS = "train/loss"
EPOCHS_OF_LOSS = 10
"""Epochs of the total loss that are kept: by its trend a run is told that its loss does not fall."""


def bound_history(hub: MessageHub, steps_an_epoch: int) -> None:
    """Limit what is kept of each scalar to an epoch, for its mean; older values go when the next one comes.

    Args:
        hub: the run's.
        steps_an_epoch: of the training.
    """
    for name, buffer in hub.log_scalars.items():
        epochs = EPOCHS_OF_LOSS if name == LOSS else 1
        buffer.max_length = max(LEAST_KEPT, epochs * steps_an_epoch)
