"""``dllmserve info``: versions, device, model and memory plan, without loading weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllmserve import __version__
from dllmserve.cli.commands import short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import ENGINE_ALONE, ModelOption, engine_config, with_options
from dllmserve.core.model_spec import NO_MASK, ExpertSpec, ModelSpec

if TYPE_CHECKING:
    from torch import device

    from dllmserve.engine.setup import EnginePlan

_SPEC = (
    "geometry block_length num_layers hidden_size num_heads num_kv_heads vocab_size mask_id "
    "eos_ids turn_end_ids"
).split()
#: what a model has none of
_ABSENT = {"mask_id": NO_MASK, "block_length": 0}
_MEMORY = "weights activations logits tables history pages planned allowed".split()
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "huggingface_hub")


@with_options(ENGINE_ALONE)
def info(
    model: ModelOption = "tiny",
    as_json: Annotated[
        bool, typer.Option("--json", metavar=" ", help="Print one JSON object.")
    ] = False,
    **options: Any,
) -> None:
    """Show versions, the device, the model and its memory plan. Loads no weights."""
    with short_errors():
        config = engine_config(model, options)
        with loading(model):
            from dllmserve.engine.setup import plan_engine

            plan = plan_engine(config)
            facts = {
                "versions": _versions(),
                "device": _device(plan.device),
                "model": _model(model, plan),
                "memory": _memory(plan),
            }
        if as_json:
            typer.echo(json.dumps(facts))
            return
        facts["memory"] |= {"plan": plan.memory.equation()}
        for title, group in facts.items():
            _print_group(title, group)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"dllmserve": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _device(device: device) -> dict[str, Any]:
    import torch

    from dllmserve.runtime.platform import device_facts

    version = {"cuda": torch.version.cuda} if device.type == "cuda" else {}
    return device_facts(device) | version


def _model(name: str, plan: EnginePlan) -> dict[str, Any]:
    spec, tokenizer = asdict(plan.spec), plan.tokenizer
    return {
        "name": name,
        "directory": str(plan.directory),
        "architecture": spec["architecture"],
        "parameters": plan.spec.parameters(),
        **{n.removeprefix("num_"): spec[n] for n in _SPEC if spec[n] != _ABSENT.get(n)},
        **_layers(plan.spec),
        **_experts(plan.spec.experts),
        "max_model_len": plan.limits.max_model_len,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "tokenizer": tokenizer is not None,
        "chat_template": tokenizer is not None and tokenizer.has_chat_template,
    }


def _layers(spec: ModelSpec) -> dict[str, str]:
    """How layers attend, if not all do in one way."""
    from dllmserve.tools.environment import kv_heads_text

    return {"attention_layers": kv_heads_text(spec)} if spec.attention else {}


def _experts(experts: ExpertSpec | None) -> dict[str, int]:
    if experts is None:
        return {}
    return {
        "experts": experts.count,
        "experts_per_token": experts.per_token,
        "expert_size": experts.size,
        "shared_expert_size": experts.shared_size,
        "layers_with_experts": sum(experts.layers),
    }


def _memory(plan: EnginePlan) -> dict[str, Any]:
    memory, limits = plan.memory, plan.limits
    return {
        "kv_bytes_per_token": plan.spec.kv_values() * plan.dtype.itemsize,
        "pages": limits.num_pages,
        "tokens_per_page": limits.page_size,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        **{f"{name}_bytes": getattr(memory, name) for name in _MEMORY},
    }


def _print_group(title: str, group: dict[str, Any]) -> None:
    typer.secho(title, bold=True)
    width = max(map(len, group)) + 2
    for key, value in group.items():
        typer.echo(f"  {key.replace('_', ' '):<{width}}{_text(value)}")


def _text(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
