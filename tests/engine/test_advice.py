"""What does not fit says which option to change, and to a value that fits."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine import machine
from dllmserve.engine.advice import does_not_fit
from dllmserve.engine.sizing import Sizing, memory_advice
from dllmserve.errors import OutOfMemoryError
from dllmserve.models.loader import find_model, read_config, read_spec

GIB = 2**30
CPU = torch.device("cpu")
SPEC: ModelSpec = read_spec(read_config(find_model("llada-8b")))


def sizing(tokens: int = 16384, max_len: int = 4096, **options: Any) -> Sizing:
    """What LLaDA-8B's shapes are to be run with."""
    return Sizing(
        spec=SPEC,
        dtype=getattr(torch, options.pop("dtype", "bfloat16")),
        tokens=options.pop("max_num_batched_tokens", tokens),
        max_len=options.pop("max_model_len", max_len),
        fused=options.pop("fused", True),
        options=EngineConfig(**options),
    )


def plan(gib: float, **options: Any) -> MemoryBudget:
    """The memory plan on a device of some size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "device_memory", lambda _: (int(gib * GIB), int(gib * GIB)))
        return machine.plan_memory(sizing(**options), CPU)[0]


def suggestions(message: str) -> list[dict[str, Any]]:
    """The options of a message, as keywords."""
    listed = re.search(r"; set (.*?); in general", message)
    if listed is None:
        return []
    found = []
    for way in listed[1].split(", or "):
        pairs = (part.split("=") for part in way.split(" with "))
        found.append({name: _value(text) for name, text in pairs})
    return found


def _value(text: str) -> Any:
    if text.startswith("'"):
        return text.strip("'")
    return float(text) if "." in text else int(text)


@pytest.mark.parametrize(
    ("gib", "options", "names"),
    [
        (
            19.8,
            {"kv_pages": 32},
            {
                "max_logit_rows",
                "max_num_batched_tokens",
                "max_history_rows",
                "gpu_memory_utilization",
            },
        ),
        (19.2, {"kv_pages": 32}, {"max_num_batched_tokens"}),
        (17.6, {"tokens": 4096, "kv_pages": 8, "max_history_rows": 0}, {"max_model_len"}),
        (60.0, {"kv_pages": 10_000}, {"kv_pages"}),
        (24.0, {"dtype": "float32"}, {"dtype"}),
        (16.0, {"dtype": "float32"}, set()),
        (39.0, {"kv_pages": 1000, "fused": False}, {"kv_pages"}),
        (20.0, {"fused": False}, set()),
        (18.6, {}, set()),
    ],
)
def test_each_suggestion_alone_is_enough(
    gib: float, options: dict[str, Any], names: set[str]
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan(gib, **options)
    ways = suggestions(str(caught.value))
    assert names <= {name for way in ways for name in way}
    for way in ways:
        fitting = plan(gib, **options | way)
        assert fitting.planned <= fitting.allowed, way
        # and there is room for a canvas, unless the number of pages was given
        canvas = way.get("max_model_len", 4096) * SPEC.kv_values() * 2
        assert "kv_pages" in options or fitting.pages >= canvas, way


def test_nothing_helps_where_the_weights_do_not_fit() -> None:
    with pytest.raises(OutOfMemoryError, match="no single option makes room") as caught:
        plan(8.0)
    assert suggestions(str(caught.value)) == []
    assert "enable tensor parallelism" in str(caught.value)


@pytest.mark.parametrize(("geometry", "sparse"), [("full", True), ("block", False)])
def test_sparse_attention_is_for_full_attention(geometry: Any, sparse: bool) -> None:
    advised = memory_advice(replace(SPEC, geometry=geometry))
    assert advised.startswith("reduce max_model_len, ")
    assert ("use sparse attention" in advised) == sparse


def test_graphs_can_be_given_up() -> None:
    """A measured plan, which takes more than was worked out; in float32 it has no logits."""
    base = plan(80.0)
    measured = replace(base, graphs=GIB, logits=0, utilization=0.9, pages=0, measured=True)
    tight = replace(measured, total=measured.planned - GIB // 2, free=10**12, utilization=1.0)

    message = does_not_fit(sizing(gpu_memory_utilization=1.0), tight, lambda _: tight.planned - GIB)
    assert "set enforce_eager=True" in message
    assert "max_logit_rows=" not in message.split("in general")[0]
