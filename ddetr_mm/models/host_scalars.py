"""Numbers that go from a GPU to the host together, and while the GPU is at work on other things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from mmdet.utils import reduce_mean
from torch import Tensor


class HostScalars(Mapping[str, Tensor]):
    """Scalars of a device under names; they come to the host in one transfer.

    The transfer starts at once, behind what the device has been given to do so far; whoever reads a scalar
    first waits for the transfer, and for nothing that was given to the device later. (Reading each
    tensor with ``.item()`` would wait once a tensor, and for all the device's work.)

    Args:
        scalars: tensors of one element on one device.
        mean_over_ranks: whether they become the mean of all ranks of a job, as one process with the whole
            batch would have them; all ranks must call this then.
    """

    def __init__(self, scalars: Mapping[str, Tensor], mean_over_ranks: bool = False) -> None:
        self._names = tuple(scalars)
        self._event: torch.cuda.Event | None = None
        stacked = torch.stack([scalar.detach().reshape(()).float() for scalar in scalars.values()])
        if mean_over_ranks:
            stacked = reduce_mean(stacked)
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(stacked.device))
        else:
            host = stacked.cpu()
        self._values = dict(zip(self._names, host.unbind(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """The scalar as a float32 tensor of no dimension on the CPU."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
