"""Routing and the sum of experts: upstream's numbers, and what does not depend on other rows."""

import pytest
import torch

from dllmserve.layers.experts import Experts
from tests.helpers import GOLDEN, golden_raw
from tests.models.test_causal_forward import load

MODELS = ("llada2-g4e8", "llada21-g4e12", "llada-moe-e8", "llada-moe-variant")


@pytest.mark.parametrize("name", MODELS)
def test_upstreams_router(name: str) -> None:
    (case,) = (c for c in golden_raw(name) if c["kind"] == "router")
    decoder = load(GOLDEN / name)
    experts = decoder.blocks[case["layer"]].mlp
    assert isinstance(experts, Experts)
    spec = decoder.spec.experts
    assert spec is not None
    x = torch.tensor(case["input"])
    # LLaDA-MoE's numbers are those without the shared expert, which is the last if it is one more
    every = range(spec.count + ("llada2" in name))
    routed = decoder.ops.route(x, experts.gate, experts.bias, spec, every)
    ids, order = routed.ids[:, : spec.per_token].sort(dim=-1)
    assert ids.tolist() == case["topk_idx_sorted"]
    torch.testing.assert_close(
        routed.weights.gather(1, order), torch.tensor(case["topk_weight"]), atol=2e-6, rtol=1e-6
    )
    inner = decoder.ops.expert_up(x, routed, experts.gate_up[: len(every)])
    rows = decoder.ops.expert_down(inner, routed, experts.down[: len(every)])
    out = decoder.ops.combine(rows, routed)[:, :8]
    torch.testing.assert_close(out, torch.tensor(case["moe_output_first8"]), atol=2e-5, rtol=1e-5)


def test_a_router_computes_in_float32() -> None:
    """Also in a model of half precision, where scores would tie."""
    decoder = load(GOLDEN / "llada21-g4e12", dtype=torch.bfloat16)
    experts, spec = decoder.blocks[1].mlp, decoder.spec.experts
    assert isinstance(experts, Experts) and spec is not None and experts.bias is not None
    assert experts.bias.dtype == torch.float32
    x = torch.randn(50, 48, generator=torch.manual_seed(0)).bfloat16()
    routed = decoder.ops.route(x, experts.gate, experts.bias, spec, range(spec.count))
    scores = (x.double() @ experts.gate.double().T).sigmoid().gather(1, routed.ids.long())
    expected = scores / scores.sum(dim=-1, keepdim=True) * spec.scale
    torch.testing.assert_close(routed.weights, expected.float(), atol=1e-5, rtol=1e-5)
