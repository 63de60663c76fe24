"""Triton kernels. Importing the package loads neither triton nor any kernel."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def missing(device: torch.device) -> list[str]:
    """Reasons why Triton kernels cannot run on the device; empty if they can.

    Kernels run on CUDA devices, or, very slowly, anywhere under Triton's interpreter, which
    the environment variable TRITON_INTERPRET=1 turns on if it is set before triton is loaded.

    Example:
        >>> missing(torch.device("cuda"))
        []
    """
    reasons = []
    if find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton)")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(
            f"Triton kernels need a CUDA device, not {device.type!r} "
            "(TRITON_INTERPRET=1 runs them slowly on a CPU, for tests)"
        )
    return reasons
