"""Models with experts whose config.json says what no golden checkpoint's does, against the twin."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write
from tests.expert_checkpoints import random_tensors, settings
from tests.models.test_causal_forward import Forwards, chunk, load
from tests.models.test_forward import logits
from tests.oracles import experts
from tests.parallel.threads import on_all, thread_groups

LLADA2, LLADA_MOE = "LLaDA2MoeModelLM", "LLaDAMoEModelLM"
CASES: list[tuple[str, dict[str, Any]]] = [
    (LLADA2, {"n_group": 1, "topk_group": 1, "num_experts": 10, "num_experts_per_tok": 3}),
    (LLADA2, {"num_experts_per_tok": 1, "routed_scaling_factor": 0.7}),
    (LLADA2, {"num_shared_experts": 2, "use_qkv_bias": True, "use_bias": True}),
    (LLADA2, {"num_shared_experts": 0, "use_qk_norm": False, "first_k_dense_replace": 0}),
    (LLADA2, {"first_k_dense_replace": 2, "tie_word_embeddings": True, "head_dim": 12}),
    (LLADA2, {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 6, "num_key_value_heads": 4}),
    (LLADA2, {"partial_rotary_factor": 1.0, "expert_capacity": 4, "block_size": 8}),
    (LLADA_MOE, {"moe_layer_freq": [0, 1], "shared_expert_intermediate_size": 28}),
    (LLADA_MOE, {"moe_layer_freq": [1, 0], "moe_router_enable_expert_bias": True}),
    (LLADA_MOE, {"qk_layernorm": False, "hidden_size": 32, "partial_rotary_factor": 0.5}),
    (LLADA_MOE, {"num_experts_per_tok": 1, "shared_expert_intermediate_size": 20}),
    ("SDARMoeForCausalLM", {"mlp_only_layers": [0], "num_experts": 5}),
    ("SDARMoeForCausalLM", {"norm_topk_prob": False, "tie_word_embeddings": True}),
    ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2, "num_experts_per_tok": 1}),
]
TOKENS = [*range(1, 30), 60, 60, 4, 60, 9]


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_twins_logits(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    """Whole, and by two ranks that cut experts or divide them."""
    config = settings(architecture, **changes)
    tensors = random_tensors(config)
    folder = write(tmp_path, config, tensors)
    twin = experts.ExpertModel(config, tensors)
    if architecture == LLADA_MOE:
        expected = twin(torch.tensor([TOKENS]))[0]
        [whole] = logits(folder, [TOKENS])
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
        return
    window = {LLADA2: 8, "SDARMoeForCausalLM": 4, "Qwen3MoeForCausalLM": 1}[architecture]
    expected = twin.block_causal(TOKENS, window)
    span = chunk(0, len(TOKENS), window)
    with torch.inference_mode():
        whole = Forwards(load(folder)).logits(TOKENS, span)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    for divided in (False, config["num_experts"] % 2 == 0):
        ranks = [
            Forwards(load(folder, group, expert_parallel=divided)) for group in thread_groups(2)
        ]
        parts = on_all([lambda rank=rank: rank.logits(TOKENS, span) for rank in ranks])  # type: ignore[misc]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
