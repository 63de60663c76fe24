"""Tiny random checkpoints of models with experts, from a config.json's settings alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracles.experts import read_shape

#: what a config.json of each architecture says if a test does not
BASE: dict[str, Any] = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "mask_token_id": 60,
    "eos_token_id": 59,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
OWN: Mapping[str, dict[str, Any]] = {
    "LLaDA2MoeModelLM": {
        "head_dim": 8,
        "intermediate_size": 36,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "partial_rotary_factor": 0.5,
    },
    "LLaDAMoEModelLM": {
        "dense_intermediate_size": 36,
        "expert_intermediate_size": 20,
        "moe_layer_freq": [1, 1],
        "partial_rotary_factor": 1.0,
        "qk_layernorm": True,
        "moe_router_enable_expert_bias": False,
        "shared_expert_intermediate_size": None,
    },
    "SDARMoeForCausalLM": {
        "head_dim": 8,
        "block_size": 4,
        "intermediate_size": 36,
        "moe_intermediate_size": 20,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}
OWN = {**OWN, "Qwen3MoeForCausalLM": OWN["SDARMoeForCausalLM"]}


def settings(architecture: str, **changes: Any) -> dict[str, Any]:
    """config.json of an architecture."""
    return BASE | OWN[architecture] | {"architectures": [architecture]} | changes


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Seeded weights with well spread logits and scores."""
    generator, shape = torch.Generator().manual_seed(seed), read_shape(config)
    names, width, dims = shape.names, config["hidden_size"], shape.dims
    q, kv = dims.heads * shape.head_dim, dims.kv_heads * shape.head_dim
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, inputs: int, gain: float = 1.0, bias: bool = False) -> None:
        drawn = torch.randn(rows, inputs, generator=generator)
        tensors[name + ".weight"] = drawn * gain / inputs**0.5
        if bias:
            tensors[name + ".bias"] = torch.randn(rows, generator=generator) * 0.3

    def norm(name: str, size: int, mean: float = 1.0) -> None:
        tensors[name + ".weight"] = mean + torch.randn(size, generator=generator) * 0.2

    def mlp(name: str, inner: int) -> None:
        for part in ("gate_proj", "up_proj"):
            matrix(f"{name}.{part}", inner, width)
        matrix(f"{name}.down_proj", width, inner)

    matrix(names["embed"], config["vocab_size"], width, width**0.5)
    size = config.get("moe_intermediate_size") or config.get("expert_intermediate_size")
    dense = config.get("intermediate_size") or config.get("dense_intermediate_size")
    for layer, sparse in enumerate(shape.sparse):
        at = names["layer"].format(layer)
        for which in ("attn_norm", "mlp_norm"):
            norm(at + names[which], width)
        if "packed" in names:
            matrix(at + names["packed"], q + 2 * kv, width, 2.0, bool(config.get("use_qkv_bias")))
        else:
            for which, rows in (("q", q), ("k", kv), ("v", kv)):
                matrix(at + names[which], rows, width, 2.0)
        matrix(at + names["o"], width, q, bias=bool(config.get("use_bias")))
        for which in ("q_norm", "k_norm") if shape.qk_norm else ():
            norm(at + names[which], shape.head_dim, 2.0)
        if not sparse:
            mlp(at + "mlp", dense)
            continue
        matrix(at + "mlp.gate", shape.experts, width, 2.0)
        if shape.router.bias:
            tensors[at + names["bias"]] = torch.randn(shape.experts, generator=generator) * 0.2
        for expert in range(shape.experts):
            mlp(f"{at}mlp.experts.{expert}", size)
        if shape.shared:
            shared = config.get("shared_expert_intermediate_size")
            mlp(at + names["shared"], shared or size * config["num_shared_experts"])
    norm(names["final_norm"], width)
    if not dims.tied:
        matrix(names["head"], config["vocab_size"], width, 2.0)
    return tensors
