"""Threads of torch while an engine runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dllmserve._forks import inherited
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
    if inherited.threads:
        return 1  # with more, torch waits for ever for those of the process that was forked
    if options.threads is not None:
        return options.threads
    present = torch.get_num_threads()
    # torch begins with a thread for each core; MKL counts cores, others processors
    untouched = present in (len(physical_cores()), len(allowed_cpus()))
    if threads_given() or not untouched:
        return present
    return max(min(present, usable_cores() - waits_busily()), 1)


@contextmanager
def engine_threads(options: EngineConfig, device: torch.device) -> Iterator[int]:
    """Give torch the threads of one rank of an engine, and afterwards those that it had.

    The number is torch's own for the whole process, so only an engine on a CPU changes it.

    Args:
        options: of the engine, whose ranks divide the threads.
        device: of the engine.

    Yields:
        The threads of a rank.
    """
    before = torch.get_num_threads()
    if device.type != "cpu":
        yield max(before // options.tensor_parallel_size, 1)
        return
    share = max(choose_threads(options) // options.tensor_parallel_size, 1)
    if share == before:
        yield share
        return
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        if torch.get_num_threads() == share:  # or somebody has chosen another number meanwhile
            torch.set_num_threads(before)
