"""EngineConfig: the options of LLM(...), checked once and never written to afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dllmserve._checks import check_ids, check_known, true_or_false
from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.catalog import BACKENDS
from dllmserve.errors import ConfigError
from dllmserve.knobs import check_knobs, knob

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("fp8",)
WARMUPS = ("none", "quick", "full")
LOAD_FORMATS = ("auto", "dummy")
KERNELS = ("auto", "torch", "triton")
MAX_THREADS = 1024
PHASES = ("auto", "mixed", "separate")
_PREFIX = "Prefix cache"
#: false forbids the code of checkpoints on a machine, whatever a caller says; true changes nothing
#: for Python, and is the option of that name for ``dllmserve serve``
CODE_VARIABLE = "DLLMSERVE_TRUST_REMOTE_CODE"


@dataclass(frozen=True)
class EngineConfig:
    """Engine options, all keywords of :class:`dllmserve.LLM`.

    Attributes:
        model: local directory, hub id, or "tiny" for the embedded model.
        enforce_eager: never use CUDA graphs.
        tensor_parallel_size: devices that share one model: GPUs, from ``device`` on, or
            processes on a CPU. Models say which numbers work: they divide the heads, the K,V
            heads and the sizes of the layers.
        expert_parallel: with tensor_parallel_size over 1, devices divide the experts of a mixture
            of experts between them, in place of each expert's inner dimension.
        max_model_len: longest prompt + answer in tokens; None takes it from config.json.
        trust_remote_code: let a tokenizer that nothing else can load run its own code, which
            a warning names before; code of config and model never runs. The environment variable
            DLLMSERVE_TRUST_REMOTE_CODE=0 forbids it for a machine.
        dtype: "auto" is float32 on a CPU and the checkpoint's dtype elsewhere.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        quantization: "fp8" scales the matrices of the layers, experts included, to e4m3 while they
            are loaded, and activations token by token; see :mod:`dllmserve.kernels.e4m3`.
            Embedding, LM head, norms, routers and K,V stay. It needs an NVIDIA GPU of compute
            capability 8.9 or more, and the dtype bfloat16.
        load_format: "auto" reads safetensors; "dummy" makes random weights from a bare
            config.json, for benchmarks.
        layers: of the model only so many layers, the first ones, with load_format="dummy"; None is
            all of them.
        attention: attention backend; "auto" is "triton" on CUDA where Triton is installed,
            else "sdpa".
        kernels: "triton" or "torch" for normalisation, rotation, activation and the
            statistics of logits; "auto" is "triton" on CUDA where it is installed.
        max_num_seqs: rows of the state table; a request with cfg_scale > 0 takes two.
        max_num_batched_tokens: tokens in one forward pass; None is twice max_model_len,
            at least 8192 and at most 32768.
        max_refresh_tokens: tokens of one forward pass that may belong to refreshes, so
            that they do not line up; None does not limit them.
        max_logit_rows: rows of logits that may exist at once; at least 2.
        max_history_rows: positions of blocks whose last distribution may be kept at once, for
            requests with ``unmask="klass"``; each takes 8 bytes for every entry of the vocabulary,
            from the start. 0 reserves nothing, neither for "klass" nor for what "credit" keeps,
            and requests with these rules are refused.
        phases: "mixed" lets refreshes and reuse of different requests share a forward
            pass, "separate" does not; "auto" runs refreshes by themselves when they fill
            half a pass, and mixes them otherwise.
        steps_per_sync: forward passes that may be launched before the host waits for the
            report of the oldest, as long as all requests in them have a fixed schedule
            (``unmask="steps"``). Only on CUDA. An answer that ends early costs up to this
            many forwards more.
        max_graphs: CUDA graphs that are kept; the least recently used are dropped.
        warmup: "quick" and "full" run made-up requests before the engine is ready, one at a time
            and more and more at once, for at most 20 and 120 seconds: kernels are compiled, and
            graphs captured. "full" draws tokens with any number of them, too, and has longer
            prompts. It is of use on CUDA.
        page_size: tokens per K,V page.
        kv_pages: pages of the K,V store; None sizes it from memory.
        prefix_caching: requests of a block-causal or an autoregressive model that begin alike share
            the K,V of their equal full pages, and pages that nobody holds keep their content until
            their place is needed. With full attention there is nothing to share.
        prefix_isolation: only requests of one owner (in a server: of one API key) share pages, so
            that nobody can learn from the time of an answer what others have asked. It needs
            prefix_caching.
        gpu_memory_utilization: share of the device's memory that the engine may plan with.
        seed: base of the seeds of requests that bring none; None is random.
        threads: threads of an engine on a CPU, and only there; ranks and engines divide them. None
            is what OMP_NUM_THREADS or MKL_NUM_THREADS says, or a call of
            ``torch.set_num_threads`` before the load, and otherwise the cores that the process
            may use (affinity, cgroup quota). The load and every step set torch's number in the
            thread that calls, and then put back what was there.
        mask_id: id fed to the model at masked positions, in place of config.json's.
        eos_ids: ids that end an answer, in place of all that config.json,
            generation_config.json, the tokenizer and the chat template name; one or a list.
        default_block_length: block length of requests that give none: in place of config.json's
            on block-causal models, of one block for the whole answer (or a quality's) with full
            attention. A SparseConfig keeps its own.

    Raises:
        ConfigError: (a ValueError) a wrong value or type.
    """

    model: str = knob("tiny", "Local directory, hub id, or tiny.")
    enforce_eager: bool = knob(False, "Never use CUDA graphs.")
    tensor_parallel_size: int = knob(1, "Devices to spread the model over.", low=1)
    expert_parallel: bool = knob(
        False, "Divide experts between the devices, in place of cutting each of them."
    )
    max_model_len: int | None = knob(
        None, "Longest prompt + answer in tokens (the model's own, if not given).", low=2
    )
    trust_remote_code: bool = knob(
        True,
        "Let a tokenizer that nothing else can load run its own code "
        "(DLLMSERVE_TRUST_REMOTE_CODE=0 forbids it).",
    )
    dtype: str = knob(
        "auto", "auto is float32 on a CPU, the checkpoint's dtype elsewhere.", choices=DTYPES
    )
    quantization: str | None = knob(
        None,
        "fp8 keeps the layers' matrices in eight bits (CUDA, of compute capability 8.9 or more).",
        choices=QUANTIZATIONS,
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N.")
    load_format: str = knob(
        "auto", "dummy makes random weights from a bare config.json.", choices=LOAD_FORMATS
    )
    layers: int | None = knob(
        None, "Layers of a dummy model (all that it has, if not given).", low=1
    )
    attention: str = knob(
        "auto",
        "Attention backend; auto is triton on CUDA, sdpa elsewhere.",
        choices=lambda: ("auto", *BACKENDS),
        own_check=True,
    )
    kernels: str = knob(
        "auto",
        "Kernels of everything but attention; auto is triton on CUDA, torch elsewhere.",
        choices=KERNELS,
    )
    max_num_seqs: int = knob(64, "Requests that run at once (guided ones count twice).", low=1)
    max_num_batched_tokens: int | None = knob(
        None, "Tokens in one forward pass (sized by the model, if not given).", low=2
    )
    max_refresh_tokens: int | None = knob(
        None,
        "Tokens of one forward pass that may refresh a cache (no limit, if not given).",
        low=2,
    )
    max_logit_rows: int = knob(1024, "Rows of logits that may exist at once.", low=2)
    max_history_rows: int = knob(
        512,
        "Positions whose last distribution is kept, for unmask=klass; with 0 neither klass nor "
        "credit runs.",
        low=0,
    )
    phases: str = knob(
        "auto",
        "Whether refreshes and reuse of different requests share a forward pass.",
        choices=PHASES,
    )
    steps_per_sync: int = knob(
        4, "Forward passes in flight before the host waits (on CUDA, fixed schedules).", low=1
    )
    max_graphs: int = knob(64, "CUDA graphs that are kept.", low=1)
    warmup: str = knob(
        "none",
        "Run made-up requests before the engine is ready, for 20 (quick) or 120 (full) seconds at "
        "most, so that the first real ones wait for no compilation.",
        choices=WARMUPS,
    )
    page_size: int = knob(32, "Tokens per K,V page.", low=1)
    kv_pages: int | None = knob(
        None, "Pages of the K,V store (sized by memory, if not given).", low=0
    )
    prefix_caching: bool = knob(
        True,
        "Share K,V pages of equal beginnings (block-causal and autoregressive models).",
        panel=_PREFIX,
    )
    prefix_isolation: bool = knob(
        False,
        "Share them between requests of one API key alone, not of different ones.",
        panel=_PREFIX,
    )
    gpu_memory_utilization: float = knob(
        0.9, "Share of the device's memory to plan with.", low=0, low_open=True, high=1
    )
    seed: int | None = knob(
        None, "Base of the seeds of requests without a seed.", low=0, high=2**63 - 1
    )
    threads: int | None = knob(
        None,
        "Threads of an engine on a CPU (the cores that the process may use, if not given).",
        low=1,
        high=MAX_THREADS,
    )
    mask_id: int | None = knob(None, "Id of the mask (config.json's, if not given).", low=0)
    eos_ids: Sequence[int] | None = knob(
        None,
        "Ids that end an answer, and no others do (those of config.json, tokenizer and chat "
        "template, if not given).",
        own_check=True,
    )
    default_block_length: int | None = knob(
        None,
        "Block length where a request gives none (config.json's on block-causal models, else the "
        "quality's or the whole answer, if not given).",
        low=1,
        high=MAX_GEN_LENGTH,
    )

    def __post_init__(self) -> None:
        err = ConfigError
        if not isinstance(self.model, str) or not self.model:
            raise err(f"model must be a path, a hub id or 'tiny', got {self.model!r}")
        if str(self.dtype).startswith("torch."):  # torch.bfloat16 itself
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if not isinstance(self.device, str):
            raise err(f"device must be 'auto', 'cpu' or 'cuda', got {self.device!r}")
        check_knobs(err, self)
        if self.attention not in ("auto", *BACKENDS.own):  # others are looked for only if need be
            check_knobs(err, self, "attention")
        if (ends := self.eos_ids) is not None:
            one = isinstance(ends, int) and not isinstance(ends, bool)
            ends = check_ids(err, "eos_ids", [ends] if one else ends)
            object.__setattr__(self, "eos_ids", tuple(dict.fromkeys(ends)))
        if self.prefix_isolation and not self.prefix_caching:
            raise err(
                "prefix_isolation=True says who shares pages, and with prefix_caching=False nobody "
                "does: leave one of them out"
            )
        if self.expert_parallel and self.tensor_parallel_size == 1:
            raise err(
                "expert_parallel=True divides experts between devices, and tensor_parallel_size=1 "
                "is one: give tensor_parallel_size, or leave expert_parallel out"
            )
        if self.layers is not None and self.load_format != "dummy":
            raise err(
                f"layers={self.layers} cuts a model that has no weights of its own: it needs "
                "load_format='dummy'"
            )
        self.check_threads(self.device)

    def check_threads(self, device: str) -> None:
        """Refuse ``threads`` for a GPU; "auto" is no GPU until it is known to be one.

        Raises:
            ConfigError: they are given, and ``device`` is a GPU.
        """
        if self.threads is not None and device.startswith("cuda"):
            raise ConfigError(
                f"threads={self.threads} is for an engine on a CPU, and the device is {device}: "
                "leave threads out, or set device='cpu'"
            )

    @classmethod
    def from_options(cls, owner: str, options: dict[str, Any]) -> EngineConfig:
        """Build a config from keywords; an unknown one is a TypeError with a suggestion."""
        check_known(owner, options, [f.name for f in fields(cls)])
        return cls(**options)


def remote_code_forbidden(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the machine's owner forbids the code of checkpoints.

    Raises:
        ConfigError: the variable is neither true nor false.
    """
    text = (os.environ if environment is None else environment).get(CODE_VARIABLE)
    return text is not None and not true_or_false(ConfigError, CODE_VARIABLE, text)
