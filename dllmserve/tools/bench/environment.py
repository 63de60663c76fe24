"""What figures depend on: versions, device, model and engine, in words and as a record."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from dllmserve import __version__
from dllmserve.config import EngineConfig
from dllmserve.engine.setup import EnginePlan
from dllmserve.runtime.platform import device_facts
from dllmserve.tools.bench.roofline import ModelCost


def versions() -> dict[str, str | None]:
    """Versions that figures depend on."""
    return {
        "dllmserve": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def facts(config: EngineConfig, plan: EnginePlan) -> dict[str, Any]:
    """What every record begins with; docs/benchmarks.md describes it."""
    cost = ModelCost.of(plan.spec, plan.dtype.itemsize)
    return {
        "versions": versions(),
        "device": device_facts(plan.device, plan.threads),
        "dtype": dtype_name(plan.dtype),
        "model": {
            "name": config.model,
            "parameters": plan.spec.parameters(),
            "layer_weight_bytes": cost.layer_weights * cost.weight_bytes,
            "head_weight_bytes": cost.head_weights * cost.weight_bytes,
            **asdict(plan.spec),
        },
    }


def engine_facts(config: EngineConfig, plan: EnginePlan) -> dict[str, Any]:
    """The engine's part of a record's "options"."""
    return {
        "engine": asdict(config),
        "limits": asdict(plan.limits),
        "attention": plan.attention,
        "kernels": plan.kernels,
    }


def model_text(config: EngineConfig, plan: EnginePlan) -> str:
    """Name and shape of the model."""
    spec = plan.spec
    weights = "random weights" if config.load_format == "dummy" else "its own weights"
    return (
        f"{config.model} ({spec.architecture}), {weights}: {spec.num_layers} layers of "
        f"{spec.hidden_size}, {spec.num_heads} heads, {spec.num_kv_heads} K,V heads of "
        f"{spec.head_dim}, MLP {spec.mlp_size}, vocabulary {spec.vocab_size}, "
        f"{spec.parameters() / 1e6:,.1f} M parameters"
    )


def device_text(plan: EnginePlan) -> str:
    """Device, dtype and torch."""
    found = device_facts(plan.device, plan.threads)
    threads = f" ({found['threads']} threads)" if "threads" in found else ""
    cuda = f", CUDA {torch.version.cuda}" if plan.device.type == "cuda" else ""
    return f"{found['name']}{threads}, {dtype_name(plan.dtype)}, torch {torch.__version__}{cuda}"


def engine_text(config: EngineConfig, plan: EnginePlan) -> str:
    """Version, kernels and sizes of the engine."""
    limits = plan.limits
    mode = ", eager" if config.enforce_eager else ""
    return (
        f"dllmserve {__version__}, attention {plan.attention}, kernels {plan.kernels}{mode}, "
        f"max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
        f"max_num_batched_tokens {limits.max_num_batched_tokens}, "
        f"max_logit_rows {limits.max_logit_rows}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as the options name it."""
    return str(dtype).removeprefix("torch.")
