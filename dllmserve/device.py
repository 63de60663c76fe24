"""Host numbers to the device, the one way in which the step path uploads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_to_device(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A 1-D tensor of host numbers on the device; on a GPU this is one small copy.

    From pinned memory: a copy from ordinary memory waits for everything launched before it.
    """
    staged = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return staged.to(device, non_blocking=True)
