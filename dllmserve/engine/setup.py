"""From an EngineConfig to a running engine, and the memory plan in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dllmserve.attention.backend import AttentionBackend, KVStore
from dllmserve.catalog import BACKENDS
from dllmserve.config import EngineConfig
from dllmserve.core.budget import NO_LIMIT, MemoryBudget
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.decoding.noise import CounterNoise
from dllmserve.engine.machine import (
    check_quantization,
    checked_plan,
    choose_attention,
    choose_device,
    choose_dtype,
    choose_kernels,
    plan_memory,
)
from dllmserve.engine.sizing import Sizing, memory_advice
from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer, with_ends
from dllmserve.errors import (
    ConfigError,
    DllmServeError,
    OutOfMemoryError,
)
from dllmserve.models.decoder import Decoder
from dllmserve.models.loader import (
    check_files,
    count_quantized,
    count_weights,
    find_model,
    load_decoder,
    read_config,
    read_spec,
)
from dllmserve.parallel.group import Group, smallest
from dllmserve.parallel.partition import Partition
from dllmserve.runtime.edits import LogitEdit, make_edits
from dllmserve.runtime.logits import Linear, LogitsHead, TorchReducer
from dllmserve.runtime.platform import is_out_of_memory, on_device, release_cached_memory
from dllmserve.runtime.runner import ModelRunner
from dllmserve.runtime.state_table import StateTable

if TYPE_CHECKING:
    from dllmserve.runtime.canvas import ExpectedEmbeddings

_log = logging.getLogger(__name__)
_MIN_STEP_TOKENS, _MAX_STEP_TOKENS = 8192, 32768
#: below this many tokens, a step runs at under half of the peak tokens a second (LLaDA-8B on an
#: H100, the embedded model on a CPU): a GPU waits for the weights, a CPU for the host
_CHEAP_TOKENS = {"cuda": 256, "cpu": 24}


@dataclass(frozen=True)
class EnginePlan:
    """All sizes of an engine, known before any weight is loaded.

    Attributes:
        directory: of the checkpoint.
        partition: the model and this rank's part of it.
        limits, memory: derived from it and from the options; memory is a rank's.
        dtype, device: of weights, activations and K,V.
        attention: name of the attention backend.
        kernels: "triton" or "torch".
        sizing: what the memory plan follows from.
        tokenizer: the checkpoint's, or None.
        threads: of torch in this rank's steps; None leaves their number alone. Known when the
            engine is built.
    """

    directory: Path
    partition: Partition
    limits: Limits
    memory: MemoryBudget
    dtype: torch.dtype
    device: torch.device
    attention: str
    kernels: str
    sizing: Sizing
    tokenizer: Tokenizer | None
    threads: int | None = None

    @property
    def spec(self) -> ModelSpec:
        """The whole model."""
        return self.partition.spec

    @property
    def devices(self) -> str:
        """Device, or devices of all ranks, for people."""
        ranks, device = self.partition.group.size, self.device
        if ranks == 1:
            return str(device)
        if device.index is None:
            return f"{ranks} x {device}"
        return f"{device} to {device.index + ranks - 1}"


@dataclass(frozen=True)
class RunnerParts:
    """Everything of a runner but the K,V pages, whose number is known last."""

    plan: EnginePlan
    decoder: Decoder
    table: StateTable
    backend: AttentionBackend
    head: LogitsHead
    edits: Mapping[str, LogitEdit]

    @classmethod
    def create(cls, plan: EnginePlan, decoder: Decoder) -> RunnerParts:
        """Allocate state table, LM head and logit edits."""
        limits = plan.limits
        triton = plan.kernels == "triton"
        exact = decoder.ops.linear if triton and plan.dtype == torch.float32 else None
        spec = plan.spec
        head = LogitsHead(
            decoder.head.weight,
            limits.max_logit_rows,
            spec.mask_id,
            _reducer(plan.kernels)(decoder.vocab),
            exact,
            cap=spec.logit_cap,
            expected=_expected(plan, decoder, exact) if spec.noise else None,
        )
        ends = len(spec.eos_ids)
        table = StateTable(limits.max_num_seqs, limits.max_model_len, plan.device, ends)
        table.noise = CounterNoise(spec.vocab_size)
        backend: AttentionBackend = BACKENDS[plan.attention].load()(plan.partition.local)
        edits = make_edits(plan.sizing.edit_sizes, decoder.vocab, plan.device, plan.kernels)
        return cls(plan, decoder, table, backend, head, edits)

    def runner(self, num_pages: int) -> ModelRunner:
        """A runner with its own pages and graphs."""
        plan, limits, options = self.plan, self.plan.limits, self.plan.sizing.options
        kv = KVStore.create(
            plan.partition.local,
            num_pages=num_pages,
            page_size=limits.page_size,
            num_rows=limits.max_num_seqs,
            pages_per_row=limits.pages_of(limits.max_model_len),
            dtype=plan.dtype,
            device=plan.device,
        )
        graphs = None
        if plan.device.type == "cuda" and not options.enforce_eager:
            from dllmserve.runtime.graphs import GraphPool  # nothing else needs it

            graphs = GraphPool(options.max_graphs)
        return ModelRunner(
            self.decoder,
            self.table,
            kv,
            self.backend,
            self.head,
            graphs,
            kernels=plan.kernels,
            edits=self.edits,
        )


def _expected(plan: EnginePlan, decoder: Decoder, exact: Linear | None) -> ExpectedEmbeddings:
    """What a model with canvases of noise is fed of its last forward."""
    from dllmserve.runtime.canvas import ExpectedEmbeddings  # nothing else needs it

    rows, block = plan.limits.max_num_seqs + 1, plan.sizing.canvas_len
    return ExpectedEmbeddings(decoder.embedding.weight, decoder.vocab, rows, block, exact)


def _reducer(kernels: str) -> type[TorchReducer]:
    """What reduces logits with "torch" or "triton"."""
    if kernels == "triton":
        from dllmserve.runtime.kernels.reducer import TritonReducer

        return TritonReducer
    return TorchReducer


def _read_model(options: EngineConfig) -> tuple[Path, ModelSpec, Tokenizer | None]:
    """Directory, spec with its end ids, and tokenizer of a checkpoint."""
    directory = find_model(options.model)
    config = read_config(directory)
    spec = read_spec(config, options)
    if options.load_format != "dummy":
        check_files(directory, config)
    # before gigabytes of weights; every rank needs the end ids that it tells of
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    return directory, with_ends(spec, tokenizer, only=options.eos_ids is not None), tokenizer


def _longest(options: EngineConfig, spec: ModelSpec) -> int:
    """Positions of the longest canvas."""
    max_len = options.max_model_len or spec.max_model_len
    if max_len > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={max_len} is over the model's own {spec.max_model_len} positions"
        )
    if spec.geometry == "block" and not spec.short_blocks and spec.block_length > max_len:
        raise ConfigError(
            f"blocks of {spec.block_length} do not fit into max_model_len={max_len}: no answer "
            "could be filled to the end of its block (default_block_length is what requests take "
            "that give none)"
        )
    return max_len


def plan_engine(options: EngineConfig, rank: int = 0) -> EnginePlan:
    """Read config.json and the tokenizer, and work out every size, for a rank.

    Raises:
        ModelError: no such model, one we do not run, or a tokenizer that cannot be read.
        ConfigError: an option that does not fit the model or the machine.
        OutOfMemoryError: weights and one step do not fit the device.
    """
    directory, spec, tokenizer = _read_model(options)
    ranks = options.tensor_parallel_size
    device = choose_device(options.device, rank, ranks)
    options.check_threads(str(device))
    dtype = choose_dtype(options.dtype, spec, device)
    exact = dtype == torch.float32
    partition = Partition(spec, Group(rank, ranks), exact, options.expert_parallel)
    attention = choose_attention(options.attention, partition.local, device)
    kernels = choose_kernels(options.kernels, device)
    check_quantization(options.quantization, dtype, device, kernels)
    max_len = _longest(options, spec)
    tokens = options.max_num_batched_tokens
    if tokens is None:
        tokens = min(max(2 * max_len, _MIN_STEP_TOKENS), _MAX_STEP_TOKENS)
    sizing = Sizing(
        options=options,
        spec=replace(partition.local, weights=count_weights(partition)),
        dtype=dtype,
        tokens=tokens,
        max_len=max_len,
        fused=attention == kernels == "triton",
        in_e4m3=count_quantized(partition, options.quantization),
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
        max_history_rows=sizing.history_rows,
        cheap_tokens=_CHEAP_TOKENS.get(device.type, 0),
        prefix_caching=options.prefix_caching,
        prefix_isolation=options.prefix_isolation,
    )
    return EnginePlan(
        directory,
        partition,
        limits,
        memory,
        dtype,
        device,
        attention,
        kernels,
        sizing,
        tokenizer,
    )


def _alone() -> None:
    """There is nobody to wait for."""


@dataclass(frozen=True)
class Loaded:
    """A rank that is ready to step; its plan is as measured."""

    runner: ModelRunner
    plan: EnginePlan


def build_runner(plan: EnginePlan, group: Group, ready: Callable[[], None] = _alone) -> Loaded:
    """Load a rank's part of the model and allocate all that a step needs.

    Args:
        plan: the rank's.
        group: the ranks.
        ready: called when the weights are loaded; returns when all ranks' are.

    Raises:
        ModelError, OutOfMemoryError, RankError.
    """
    try:
        with on_device(plan.device):
            return _build_runner(plan, group, ready)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, DllmServeError):
            raise
        raise OutOfMemoryError(
            f"out of memory while loading {plan.directory.name} "
            f"({plan.memory.equation()}): {memory_advice(plan.spec)}"
        ) from error


def _build_runner(plan: EnginePlan, group: Group, ready: Callable[[], None]) -> Loaded:
    sizes: dict[str, Any] = {
        "dtype": plan.dtype,
        "device": plan.device,
        "max_len": plan.limits.max_model_len,
        "kernels": plan.kernels,
        "quantization": plan.sizing.options.quantization,
    }
    partition = replace(plan.partition, group=group)  # which is connected now
    if plan.sizing.options.load_format == "dummy":
        from dllmserve.models.random import random_decoder

        decoder = random_decoder(partition, **sizes)
    else:
        decoder = load_decoder(plan.directory, partition, **sizes)
    ready()
    parts = RunnerParts.create(plan, decoder)
    if plan.device.type == "cuda":
        plan = measured_plan(plan, parts)
    # all ranks plan alike, but their memory need not be the same
    pages = smallest(group, plan.limits.num_pages, plan.device)
    plan = replace(plan, limits=replace(plan.limits, num_pages=pages))
    _log.info("memory: %s", plan.memory.equation())
    return Loaded(parts.runner(pages), plan)


def measured_plan(plan: EnginePlan, parts: RunnerParts) -> EnginePlan:
    """The plan with activations and graphs as measured, and the pages that they leave room for.

    Raises:
        OutOfMemoryError: it does not fit; the message says which option to change.
    """
    from dllmserve.engine.profile import PROFILE_PAGES, measure

    limits = plan.limits
    runner = parts.runner(PROFILE_PAGES)
    bare = measure(runner, limits, plan.memory, max_graphs=plan.sizing.options.max_graphs)
    del runner
    release_cached_memory()
    memory, pages = checked_plan(plan.sizing, bare)
    return replace(plan, memory=memory, limits=replace(limits, num_pages=pages))
