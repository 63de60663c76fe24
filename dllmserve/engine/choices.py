"""What "auto" stands for, on a model and a machine."""

from __future__ import annotations

import torch

from dllmserve.catalog import BACKENDS
from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError
from dllmserve.kernels import missing


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
