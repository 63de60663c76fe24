"""Shares: which devices, threads and memory each of several engines on one machine gets."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dllmserve._environment import child_environment
from dllmserve.config import EngineConfig
from dllmserve.cores import threads_given, usable_cores
from dllmserve.errors import ConfigError, EngineStartError

_CUDA = re.compile(r"cuda(?::(\d+))?")
#: runs in another process, because this one must load neither torch nor CUDA
_COUNT = (
    "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0, flush=True)"
)


@dataclass(frozen=True)
class Share:
    """What one engine is started with.

    Attributes:
        options: fields of its EngineConfig.
        environment: variables of its process besides the owner's.
    """

    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


async def shares(options: dict[str, Any], engines: int, timeout_s: float) -> list[Share]:
    """A share for each engine.

    One engine gets what was asked for, unchanged. Of several, each has GPUs of its own, as
    many as ``tensor_parallel_size``; on a CPU they divide cores and memory.

    Args:
        options: fields of EngineConfig, the same for all.
        engines: how many there are.
        timeout_s: for counting the GPUs.

    Raises:
        ConfigError: there are not enough GPUs.
        EngineStartError: they could not be counted.
    """
    device = str(options.get("device", EngineConfig.device))
    if engines == 1:
        return [Share(options)]
    if device.partition(":")[0] == "cpu":
        return _shares_of_cores(options, engines)
    named = _CUDA.fullmatch(device)
    if named is None and device != "auto":
        return [Share(options)] * engines  # each engine reports the wrong device
    gpus = await count_gpus(timeout_s)
    if named is None and not gpus:
        return _shares_of_cores(options, engines)
    return _shares_of_gpus(options, engines, gpus, int((named and named[1]) or 0))


def _shares_of_cores(options: dict[str, Any], engines: int) -> list[Share]:
    """Equal parts of this machine's cores and memory."""
    planned = options.get("gpu_memory_utilization", EngineConfig.gpu_memory_utilization)
    divided = {**options, "device": "cpu", "gpu_memory_utilization": planned / engines}
    environment: dict[str, str] = {}
    # otherwise each engine would start a thread for every core, and the threads would wait for
    # each other; an engine divides its part among its ranks
    if options.get("threads") is not None:
        divided["threads"] = max(int(options["threads"]) // engines, 1)
    elif not threads_given():
        environment["OMP_NUM_THREADS"] = str(max(usable_cores() // engines, 1))
    return [Share(divided, environment)] * engines


def _shares_of_gpus(options: dict[str, Any], engines: int, gpus: int, first: int) -> list[Share]:
    """As many GPUs for each as its model is spread over, one engine after the other."""
    width = _width(options)
    if first + engines * width > gpus:
        behind = f" from cuda:{first} on" if first else ""
        fits = max(gpus - first, 0) // width
        if fits:
            way_out = f"data_parallel_size={fits} would work"
        elif gpus:
            way_out = "not even one engine fits: lower tensor_parallel_size, or give another device"
        else:
            way_out = "device='cpu' runs the engines without"
        raise ConfigError(
            f"data_parallel_size={engines} x tensor_parallel_size={width} needs "
            f"{engines * width} GPUs{behind}, and there are {gpus}: {way_out}"
        )
    return [
        Share({**options, "device": f"cuda:{first + index * width}"}) for index in range(engines)
    ]


def _width(options: Mapping[str, Any]) -> int:
    """Devices of one engine."""
    return int(options.get("tensor_parallel_size", EngineConfig.tensor_parallel_size))


async def count_gpus(timeout_s: float) -> int:
    """CUDA devices that an engine of ours would see.

    Raises:
        EngineStartError: the process that counts them failed, or took too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _COUNT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
    except OSError as error:
        raise EngineStartError(f"the GPUs could not be counted: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            said, complaint = await process.communicate()
    except TimeoutError as error:
        raise EngineStartError(f"the GPUs could not be counted in {timeout_s:g} s") from error
    finally:
        with suppress(ProcessLookupError):  # it has ended, unless the time ran out
            process.kill()
        await process.wait()
    words = said.split()
    if process.returncode or not words or not words[-1].isdigit():
        lines = complaint.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise EngineStartError(f"the GPUs could not be counted: {lines[-1]}")
    return int(words[-1])
