"""From an EngineConfig to a running engine, and the memory plan in between."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dllmserve.attention.backend import AttentionBackend, KVStore
from dllmserve.config import EngineConfig
from dllmserve.core.budget import NO_LIMIT, MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.scheduler import Limits, Scheduler, SpanSource
from dllmserve.engine.advice import OOM_ADVICE
from dllmserve.engine.core import EngineCore
from dllmserve.engine.memory import checked_plan, plan_memory
from dllmserve.engine.profile import PROFILE_PAGES, measure
from dllmserve.engine.sizing import Sizing
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import ConfigError, OutOfMemoryError
from dllmserve.kernels import missing
from dllmserve.models.decoder import Decoder
from dllmserve.models.loader import (
    find_model,
    load_decoder,
    random_decoder,
    read_config,
    read_spec,
    require_weights,
)
from dllmserve.registry import ATTENTION_BACKENDS, CACHE_POLICIES, resolve
from dllmserve.runtime.graphs import GraphPool
from dllmserve.runtime.logits import LogitsHead, TorchReducer, TritonReducer
from dllmserve.runtime.platform import is_out_of_memory, on_device, release_cached_memory
from dllmserve.runtime.runner import ModelRunner
from dllmserve.runtime.state_table import StateTable

_log = logging.getLogger(__name__)
_MIN_STEP_TOKENS, _MAX_STEP_TOKENS = 8192, 32768


@dataclass(frozen=True)
class EnginePlan:
    """All sizes of an engine, known before any weight is loaded.

    Attributes:
        directory: of the checkpoint.
        config: its config.json.
        spec, limits, memory: derived from it and from the options.
        dtype, device: of weights, activations and K,V.
        attention: name of the attention backend.
        kernels: "triton" or "torch".
        sizing: what the memory plan follows from.
    """

    directory: Path
    config: dict[str, Any]
    spec: ModelSpec
    limits: Limits
    memory: MemoryBudget
    dtype: torch.dtype
    device: torch.device
    attention: str
    kernels: str
    sizing: Sizing


@dataclass(frozen=True)
class RunnerParts:
    """Everything of a runner but the K,V pages, whose number is known last."""

    plan: EnginePlan
    decoder: Decoder
    table: StateTable
    backend: AttentionBackend
    head: LogitsHead

    @classmethod
    def create(cls, plan: EnginePlan, decoder: Decoder) -> RunnerParts:
        """Allocate state table and LM head."""
        spec, limits = plan.spec, plan.limits
        triton = plan.kernels == "triton"
        exact = decoder.ops.linear if triton and plan.dtype == torch.float32 else None
        head = LogitsHead(
            decoder.head_weight,
            limits.max_logit_rows,
            spec.mask_id,
            TritonReducer() if triton else TorchReducer(),
            exact,
        )
        table = StateTable(limits.max_num_seqs, limits.max_model_len, plan.device)
        backend: AttentionBackend = resolve(ATTENTION_BACKENDS, plan.attention)(spec)
        return cls(plan, decoder, table, backend, head)

    def runner(self, num_pages: int) -> ModelRunner:
        """A runner with its own pages and graphs."""
        plan, limits, options = self.plan, self.plan.limits, self.plan.sizing.options
        kv = KVStore.create(
            plan.spec,
            num_pages=num_pages,
            page_size=limits.page_size,
            num_rows=limits.max_num_seqs,
            pages_per_row=-(-limits.max_model_len // limits.page_size),
            dtype=plan.dtype,
            device=plan.device,
        )
        graphs = None
        if plan.device.type == "cuda" and not options.enforce_eager:
            graphs = GraphPool(options.max_graphs)
        return ModelRunner(
            self.decoder,
            self.table,
            kv,
            self.backend,
            self.head,
            graphs,
            kernels=plan.kernels,
            max_history_rows=limits.max_history_rows,
        )


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
    attention = _attention(options.attention, spec, device)
    kernels = _kernels(options.kernels, device)
    max_len = options.max_model_len or spec.max_model_len
    if max_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={max_len} is over the model's own {spec.max_model_len} positions"
        )
    tokens = options.max_num_batched_tokens
    if tokens is None:
        tokens = min(max(2 * max_len, _MIN_STEP_TOKENS), _MAX_STEP_TOKENS)
    sizing = Sizing(
        options=options,
        spec=spec,
        dtype=dtype,
        tokens=tokens,
        max_len=max_len,
        fused=attention == kernels == "triton",
    )
    memory, pages = plan_memory(sizing, device)
    limits = Limits(
        max_model_len=max_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_logit_rows=options.max_logit_rows,
        page_size=options.page_size,
        num_pages=pages,
        max_refresh_tokens=options.max_refresh_tokens or NO_LIMIT,
        phases=options.phases,
        max_history_rows=options.max_history_rows,
    )
    return EnginePlan(
        directory, config, spec, limits, memory, dtype, device, attention, kernels, sizing
    )


def build_engine(options: EngineConfig) -> tuple[EngineCore, EnginePlan]:
    """Load the model and set up an engine.

    Raises:
        ModelError, ConfigError, OutOfMemoryError: see :func:`plan_engine` and the loader.
    """
    if options.load_format != "dummy":
        require_weights(find_model(options.model))  # before its sizes are held against memory
    plan = plan_engine(options)
    try:
        with on_device(plan.device):
            return _build(options, plan)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            f"out of memory while loading {plan.directory.name} "
            f"({plan.memory.equation()}): {OOM_ADVICE}"
        ) from error


def _build(options: EngineConfig, plan: EnginePlan) -> tuple[EngineCore, EnginePlan]:
    spec, limits = plan.spec, plan.limits
    # first, because a broken one should not be noticed after gigabytes of weights
    tokenizer = load_tokenizer(plan.directory, trust_remote_code=options.trust_remote_code)
    sizes: dict[str, Any] = {
        "dtype": plan.dtype,
        "device": plan.device,
        "max_len": limits.max_model_len,
        "kernels": plan.kernels,
    }
    if options.load_format == "dummy":
        decoder = random_decoder(spec, **sizes)
    else:
        decoder = load_decoder(plan.directory, plan.config, spec, **sizes)
    parts = RunnerParts.create(plan, decoder)
    if plan.device.type == "cuda":
        plan = measured_plan(plan, parts)
        limits = plan.limits
    _log.info("memory: %s", plan.memory.equation())
    runner = parts.runner(limits.num_pages)
    policies: dict[str, SpanSource] = {n: resolve(CACHE_POLICIES, n)() for n in CACHE_POLICIES}
    scheduler = Scheduler(spec, limits, policies.__getitem__)
    depth = options.steps_per_sync if plan.device.type == "cuda" else 1
    return EngineCore(scheduler, runner, tokenizer, options.seed, depth), plan


def measured_plan(plan: EnginePlan, parts: RunnerParts) -> EnginePlan:
    """The plan with activations and graphs as measured, and the pages that they leave room for.

    Raises:
        OutOfMemoryError: it does not fit; the message says which option to change.
    """
    limits = plan.limits
    runner = parts.runner(PROFILE_PAGES)
    bare = measure(runner, limits, plan.memory, max_graphs=plan.sizing.options.max_graphs)
    del runner
    release_cached_memory()
    memory, pages = checked_plan(plan.sizing, bare)
    return replace(plan, memory=memory, limits=replace(limits, num_pages=pages))


def _attention(name: str, spec: ModelSpec, device: torch.device) -> str:
    """The attention backend; "auto" is the fastest that serves the model on the device."""
    if name == "auto":
        return "triton" if device.type == "cuda" and not missing(device) else "sdpa"
    if reasons := resolve(ATTENTION_BACKENDS, name)(spec).unsupported(spec, device):
        raise ConfigError(f"attention={name!r}: {'; '.join(reasons)}")
    return name


def _kernels(name: str, device: torch.device) -> str:
    """Which kernels serve everything but attention."""
    reasons = missing(device)
    if name == "auto":
        return "triton" if device.type == "cuda" and not reasons else "torch"
    if name == "triton" and reasons:
        raise ConfigError(f"kernels='triton': {'; '.join(reasons)}")
    return name


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and device.index is None:
        # with its number, because which device is the current one differs between threads
        device = torch.device("cuda", torch.cuda.current_device())
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
