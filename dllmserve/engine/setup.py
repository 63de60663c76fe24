"""From an EngineConfig to a running engine, and the memory plan in between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllmserve.attention.backend import AttentionBackend, KVStore
from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.scheduler import Limits, Scheduler, SpanSource
from dllmserve.engine.core import OOM_ADVICE, EngineCore, is_out_of_memory
from dllmserve.engine.memory import plan_memory
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import ConfigError, OutOfMemoryError
from dllmserve.models.loader import (
    find_model,
    load_decoder,
    random_decoder,
    read_config,
    read_spec,
)
from dllmserve.registry import ATTENTION_BACKENDS, CACHE_POLICIES, resolve
from dllmserve.runtime.runner import ModelRunner
from dllmserve.runtime.state_table import StateTable

_MIN_STEP_TOKENS, _MAX_STEP_TOKENS = 8192, 32768


@dataclass(frozen=True)
class EnginePlan:
    """All sizes of an engine, known before any weight is loaded.

    Attributes:
        directory: of the checkpoint.
        config: its config.json.
        spec, limits, memory: derived from it and from the options.
        dtype, device: of weights, activations and K,V.
    """

    directory: Path
    config: dict[str, Any]
    spec: ModelSpec
    limits: Limits
    memory: MemoryBudget
    dtype: torch.dtype
    device: torch.device


def plan_engine(options: EngineConfig) -> EnginePlan:
    """Read config.json and work out every size.

    Raises:
        ModelError: no such model, or one we do not run.
        ConfigError: an option that does not fit the model or the machine.
        OutOfMemoryError: weights and one step do not fit the device.
    """
    directory = find_model(options.model)
    config = read_config(directory)
    spec = read_spec(config)
    device = _device(options.device)
    dtype = _dtype(options.dtype, spec, device)
    if reasons := resolve(ATTENTION_BACKENDS, options.attention)(spec).unsupported(spec, device):
        raise ConfigError(f"attention={options.attention!r}: {'; '.join(reasons)}")
    max_len = options.max_model_len or spec.max_model_len
    if max_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={max_len} is over the model's own {spec.max_model_len} positions"
        )
    tokens = options.max_num_batched_tokens
    if tokens is None:
        tokens = min(max(2 * max_len, _MIN_STEP_TOKENS), _MAX_STEP_TOKENS)
    memory, pages = plan_memory(options, spec, dtype, device, tokens=tokens, max_len=max_len)
    limits = Limits(
        max_model_len=max_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_logit_rows=options.max_logit_rows,
        page_size=options.page_size,
        num_pages=pages,
    )
    return EnginePlan(directory, config, spec, limits, memory, dtype, device)


def build_engine(options: EngineConfig) -> tuple[EngineCore, EnginePlan]:
    """Load the model and set up an engine."""
    plan = plan_engine(options)
    try:
        engine = _build(options, plan)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory while loading {plan.directory.name} "
            f"({plan.memory.equation()}): {OOM_ADVICE}"
        ) from error
    return engine, plan


def _build(options: EngineConfig, plan: EnginePlan) -> EngineCore:
    spec, limits = plan.spec, plan.limits
    # first, because a broken one should not be noticed after gigabytes of weights
    tokenizer = load_tokenizer(plan.directory, trust_remote_code=options.trust_remote_code)
    sizes: dict[str, Any] = {"dtype": plan.dtype, "device": plan.device}
    if options.load_format == "dummy":
        decoder = random_decoder(spec, **sizes, max_len=limits.max_model_len)
    else:
        decoder = load_decoder(
            plan.directory, plan.config, spec, **sizes, max_len=limits.max_model_len
        )
    kv = KVStore.create(
        spec,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        num_rows=limits.max_num_seqs,
        pages_per_row=-(-limits.max_model_len // limits.page_size),
        **sizes,
    )
    table = StateTable(limits.max_num_seqs, limits.max_model_len, plan.device)
    backend: AttentionBackend = resolve(ATTENTION_BACKENDS, options.attention)(spec)
    runner = ModelRunner(decoder, table, kv, backend, limits.max_logit_rows)
    policies: dict[str, SpanSource] = {n: resolve(CACHE_POLICIES, n)() for n in CACHE_POLICIES}
    scheduler = Scheduler(spec, limits, policies.__getitem__)
    return EngineCore(scheduler, runner, tokenizer, options.seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def _dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """float32 on a CPU by default: exact, and bf16 is slow on many CPUs."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else spec.dtype.removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"config.json asks for dtype {name!r}; pass dtype='bfloat16'")
    assert isinstance(dtype, torch.dtype)  # narrows the type; the line above checked it
    return dtype
