"""What an engine takes of the machine: device, dtype, kernels, threads and memory.

torch keeps the number of threads for each calling thread, and gives a thread that uses torch for
the first time the number that was set last anywhere in the process. So an engine sets its own
number where it computes, and puts back what was there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dllmserve._system import inherited
from dllmserve.catalog import BACKENDS
from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.cores import (
    allowed_cpus,
    physical_cores,
    threads_given,
    usable_cores,
    waits_busily,
)
from dllmserve.engine.sizing import Sizing
from dllmserve.errors import ConfigError, EngineError, OutOfMemoryError
from dllmserve.kernels import missing

_log = logging.getLogger("dllmserve.engine")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose_attention(name: str, spec: ModelSpec, device: torch.device) -> str:
    """The attention backend; "auto" is the fastest that serves the model on the device."""
    if name == "auto":
        return "triton" if device.type == "cuda" and not missing(device) else "sdpa"
    if reasons := BACKENDS[name].load()(spec).unsupported(spec, device):
        raise ConfigError(f"attention={name!r}: {'; '.join(reasons)}")
    return name


def choose_kernels(name: str, device: torch.device) -> str:
    """Which kernels serve everything but attention."""
    reasons = missing(device)
    if name == "auto":
        return "triton" if device.type == "cuda" and not reasons else "torch"
    if name == "triton" and reasons:
        raise ConfigError(f"kernels='triton': {'; '.join(reasons)}")
    return name


def choose_device(name: str, rank: int = 0, ranks: int = 1) -> torch.device:
    """The device of a rank; ranks take GPUs one after the other, from the one that is named."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    first = device.index
    if first is None:
        # with its number, because which device is the current one differs between threads
        first = torch.cuda.current_device() if ranks == 1 and count else 0
    if first + ranks > count:
        wanted = f"device={name!r}" if ranks == 1 else f"tensor_parallel_size={ranks}"
        more = f", from cuda:{first} on" if ranks > 1 and first else ""
        raise ConfigError(f"{wanted}: this machine has {count} GPUs{more}")
    return torch.device("cuda", first + rank)


def choose_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """float32 on a CPU by default: exact, and bf16 is slow on many CPUs."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else spec.dtype.removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"config.json asks for dtype {name!r}; pass dtype='bfloat16'")
    assert isinstance(dtype, torch.dtype)  # narrows the type; the line above checked it
    return dtype


def check_quantization(
    name: str | None, dtype: torch.dtype, device: torch.device, kernels: str
) -> None:
    """Raise ConfigError unless the device can compute so."""
    if name is None:
        return
    if reason := _not_quantized(dtype, device, kernels):
        raise ConfigError(f"quantization={name!r}: {reason}, or leave quantization out")


def _not_quantized(dtype: torch.dtype, device: torch.device, kernels: str) -> str:
    """Why products cannot be those of eight-bit numbers; "" if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and the device is {device}: choose another device"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        found = ".".join(map(str, capability))
        return (
            f"it needs compute capability 8.9 or more (L4, H100, ..), and {device} has {found}: "
            "choose another device"
        )
    if dtype != torch.bfloat16:  # torch's product of rows writes no other in all releases
        own = str(dtype).removeprefix("torch.")
        return f"it computes in bfloat16, and the model runs in {own}: give dtype='bfloat16'"
    if kernels != "triton":
        why = f" ({'; '.join(reasons)})" if (reasons := missing(device)) else ""
        return f"it needs Triton kernels, and they are {kernels!r}{why}: set kernels='triton'"
    return ""


def mind_the_parent(options: EngineConfig) -> None:
    """Do without what a forked process cannot use of its parent's, where that is possible.

    Raises:
        EngineError: it is CUDA.
    """
    if inherited.cuda and not options.device.startswith("cpu"):
        raise EngineError(
            "CUDA cannot be used in a process that was forked from one that has used it: start "
            "the process with multiprocessing's 'spawn' method, or set device='cpu'"
        )
    if inherited.threads and torch.get_num_threads() > 1:
        _log.warning(
            "this process was forked from one that had loaded torch, whose threads it does not "
            "have: torch computes with one thread here; start the process with multiprocessing's "
            "'spawn' method to use more"
        )
        torch.set_num_threads(1)  # with more, torch waits for ever for those of the parent


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


def plan_memory(sizing: Sizing, device: torch.device) -> tuple[MemoryBudget, int]:
    """The memory plan, and the number of K,V pages that it leaves room for.

    Raises:
        OutOfMemoryError: the parts do not fit together; the message has the equation.
    """
    total, free = device_memory(device)
    if device.type == "cpu":  # which all ranks share
        ranks = sizing.options.tensor_parallel_size
        total, free = total // ranks, free // ranks
    return checked_plan(sizing, replace(sizing.bare(), total=total, free=free))


def checked_plan(sizing: Sizing, bare: MemoryBudget) -> tuple[MemoryBudget, int]:
    """A plan without pages, worked out or measured, with the pages that fit, and their number.

    Raises:
        OutOfMemoryError: too large; the message has the option to change.
    """
    memory, pages = sizing.with_pages(bare)
    if memory.planned > memory.allowed:
        from dllmserve.engine.advice import does_not_fit

        raise OutOfMemoryError(does_not_fit(sizing, memory, Sizing.least))
    return memory, pages


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of the device, and those that are free; on a CPU all count as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # what this process has freed but keeps cached can be used again
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return total, free + cached
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file():
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total, total
