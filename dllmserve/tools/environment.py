"""What figures depend on: versions, device, model and engine, in words and as a record."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from dllmserve import __version__
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.setup import EnginePlan
from dllmserve.runtime.platform import device_facts
from dllmserve.tools.bench.roofline import ModelCost


def environment(config: EngineConfig, plan: EnginePlan) -> dict[str, Any]:
    """What every record begins with; docs/benchmarks.md describes it."""
    cost = ModelCost.of(plan.spec, plan.dtype.itemsize, config.quantization)
    return {
        "versions": {
            "dllmserve": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "device": device_facts(plan.device, plan.threads),
        "dtype": dtype_name(plan),
        "model": {
            "name": config.model,
            "parameters": plan.spec.parameters(),
            "layer_weight_bytes": cost.layer_weights * cost.matrix_bytes,
            "expert_weight_bytes": cost.expert_layers
            * cost.experts
            * cost.expert_weights
            * cost.matrix_bytes,
            "head_weight_bytes": cost.head_weights * cost.weight_bytes,
            **asdict(plan.spec),
        },
        "options": {
            "engine": asdict(config),
            "limits": asdict(plan.limits),
            "attention": plan.attention,
            "kernels": plan.kernels,
        },
    }


def header_lines(config: EngineConfig, plan: EnginePlan) -> dict[str, str]:
    """The first lines of a report: name and shape of the model, device and torch, the engine."""
    spec, limits, found = plan.spec, plan.limits, device_facts(plan.device, plan.threads)
    weights = "random weights" if config.load_format == "dummy" else "its own weights"
    threads = f" ({found['threads']} threads)" if "threads" in found else ""
    cuda = f", CUDA {torch.version.cuda}" if plan.device.type == "cuda" else ""
    mode = ", eager" if config.enforce_eager else ""
    narrow = f" (matrices {config.quantization})" if config.quantization else ""
    inner = f"MLP {spec.mlp_size}"
    if (experts := spec.experts) is not None:
        of = f"{experts.per_token} of {experts.count} experts of {experts.size}"
        inner = of if experts.everywhere else f"{inner}, {of}"
    return {
        "model": f"{config.model} ({spec.architecture}), {weights}: {spec.num_layers} layers of "
        f"{spec.hidden_size}, {spec.num_heads} heads, {kv_heads_text(spec)}, "
        f"{inner}, vocabulary {spec.vocab_size}, "
        f"{spec.parameters() / 1e6:,.1f} M parameters",
        "device": f"{found['name']}{threads}, {dtype_name(plan)}{narrow}, "
        f"torch {torch.__version__}{cuda}",
        "engine": f"dllmserve {__version__}, attention {plan.attention}, kernels {plan.kernels}"
        f"{mode}, max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
        f"max_num_batched_tokens {limits.max_num_batched_tokens}, "
        f"max_logit_rows {limits.max_logit_rows}",
    }


def kv_heads_text(spec: ModelSpec) -> str:
    """Number and size of K,V heads, and what layers see.

    Example:
        "2 K,V heads of 64", or "8 K,V heads of 256 with a window of 1024 (25 layers), 2 K,V heads
        of 512 (5 layers)".
    """
    kinds = Counter((a.num_kv_heads, a.head_dim, a.window) for a in spec.layers)
    texts = []
    for (heads, dim, window), layers in kinds.items():
        text = f"{heads} K,V heads of {dim}" + (f" with a window of {window}" if window else "")
        share = f" ({layers} layer{'s' if layers > 1 else ''})"
        texts.append(text + share if len(kinds) > 1 else text)
    return ", ".join(texts)


def dtype_name(plan: EnginePlan) -> str:
    """The dtype as the options name it."""
    return str(plan.dtype).removeprefix("torch.")
