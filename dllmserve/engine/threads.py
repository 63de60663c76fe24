"""Threads of torch while an engine loads or steps on a CPU.

torch keeps the number for each calling thread, and gives a thread that uses torch for the first
time the number that was set last anywhere in the process. So an engine sets its own number where
it computes, and puts back what was there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dllmserve._system import inherited
from dllmserve.config import EngineConfig
from dllmserve.cores import (
    allowed_cpus,
    physical_cores,
    threads_given,
    usable_cores,
    waits_busily,
)


def choose_threads(options: EngineConfig) -> int:
    """Threads of an engine on a CPU, of all its ranks together.

    What the user has said counts, by ``threads``, by the environment or by a call of
    ``torch.set_num_threads``; then the cores that this process may use. Where torch was loaded
    by somebody else, its threads wait busily, and one core is left to other programs.
    """
    if options.threads is not None:
        return options.threads
    present = torch.get_num_threads()
    # torch begins with a thread for each core; MKL counts cores, others processors
    untouched = present in (len(physical_cores()), len(allowed_cpus()))
    if threads_given() or not untouched:
        return present
    return max(min(present, usable_cores() - waits_busily()), 1)


def rank_threads(options: EngineConfig, device: torch.device, *, own: bool = False) -> int | None:
    """Threads of one rank of an engine; None leaves torch's number alone, as on a GPU.

    Args:
        options: of the engine, whose ranks divide the threads.
        device: of the rank.
        own: whoever started this rank's process has given it a number, which only ``threads``
            overrides.
    """
    if inherited.threads:
        return 1  # with more, torch waits for ever for those of the process that was forked
    if device.type != "cpu" or (own and options.threads is None):
        return None
    return max(choose_threads(options) // options.tensor_parallel_size, 1)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Compute with a number of threads in the calling thread, and then put back what was there.

    Args:
        number: of threads; None leaves torch's alone.
    """
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    try:
        if before != number:
            torch.set_num_threads(number)
        yield
    finally:
        # in a forked process torch would wait for ever with what was there
        if torch.get_num_threads() != before and not inherited.threads:
            torch.set_num_threads(before)
