"""Naive forwards of models with experts: LLaDA2.0 to 2.2, LLaDA-MoE, SDAR-MoE and Qwen3-MoE.

Upstream: modeling code of inclusionAI's LLaDA2.X and LLaDA-MoE checkpoints, of SDAR-30B-A3B, and
transformers' Qwen3Moe; LLaDA2.2's block routing as in SGLang's `llada2.py`. Every choice of a
token's experts is made on its own; equal scores go to the lower expert, which upstream leaves to
`torch.topk`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import DREAM_NAMES, Dims, OracleModel, read

INCLUSION_MASK = 156895  # no released config.json of these names it
QWEN_NAMES = {
    **DREAM_NAMES,
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "bias": "mlp.expert_bias",
    "shared": "shared_expert",
}
LLADA2_NAMES = {
    **QWEN_NAMES,
    "embed": "model.word_embeddings",
    "packed": "attention.query_key_value",
    "o": "attention.dense",
    "q_norm": "attention.query_layernorm",
    "k_norm": "attention.key_layernorm",
    "bias": "mlp.gate.expert_bias",
    "shared": "mlp.shared_experts",
}


class Router(NamedTuple):
    """How a token takes its experts."""

    per_token: int
    score: str = "softmax"  # of all logits, or "sigmoid" of each
    bias: str = ""  # of scores: for the "choice" alone, or in the "weights" too
    groups: int = 1  # consecutive runs of experts, of which the best ones count
    top_groups: int = 1
    normalize: bool = False
    scale: float = 1.0
    capacity: int = 0  # experts that the tokens of a window take among them, if not all
    window: int = 0  # tokens of a window


class Shape(NamedTuple):
    """What a config.json says of a model with experts."""

    dims: Dims
    names: Mapping[str, str]
    head_dim: int
    rotary: int  # dimensions of a head that turn
    qk_norm: bool
    sparse: list[bool]  # of each layer
    experts: int
    shared: bool
    router: Router


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Reads a config.json; `architectures` decides, since model types collide."""
    readers = {
        "LLaDA2MoeModelLM": llada2_shape,
        "LLaDAMoEModelLM": llada_moe_shape,
        "SDARMoeForCausalLM": qwen_shape,
        "Qwen3MoeForCausalLM": qwen_shape,
    }
    for key, known in (("rope_scaling", None), ("clip_qkv", None), ("hidden_act", "silu")):
        if config.get(key, known) != known:
            raise ValueError(f"oracle knows no {key}={config[key]!r}")
    return readers[config["architectures"][0]](config)


def dims_of(config: Mapping[str, Any], mask_id: int) -> Dims:
    """The numbers that all of them call by the same names."""
    return Dims(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        tied=config.get("tie_word_embeddings", False),
        mask_id=config.get("mask_token_id", mask_id),
        shifted=False,
    )


def llada2_shape(config: Mapping[str, Any]) -> Shape:
    """LLaDA2.X, whose code ignores norm_topk_prob, score_function and rotary_dim.

    With an expert capacity there are no groups.
    """
    capacity = config.get("expert_capacity") or 0
    top_k, layers = config["num_experts_per_tok"], config["num_hidden_layers"]
    head_dim = config["head_dim"]
    return Shape(
        dims=dims_of(config, INCLUSION_MASK),
        names=LLADA2_NAMES,
        head_dim=head_dim,
        rotary=int(head_dim * config["partial_rotary_factor"]),
        qk_norm=config.get("use_qk_norm", True),
        sparse=[i >= config["first_k_dense_replace"] for i in range(layers)],
        experts=config["num_experts"],
        shared=bool(config["num_shared_experts"]),
        router=Router(
            per_token=top_k,
            score="sigmoid",
            bias="choice",
            groups=1 if capacity else config["n_group"],
            top_groups=1 if capacity else config["topk_group"],
            normalize=top_k > 1,
            scale=config["routed_scaling_factor"],
            capacity=capacity,
            window=config["block_size"] if capacity else 0,
        ),
    )


def llada_moe_shape(config: Mapping[str, Any]) -> Shape:
    """LLaDA-MoE, whose code ignores norm_topk_prob, score function, scaling and groups."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return Shape(
        dims=dims_of(config, INCLUSION_MASK),
        names=QWEN_NAMES,
        head_dim=head_dim,
        rotary=int(head_dim * config["partial_rotary_factor"]),
        qk_norm=config["qk_layernorm"],
        sparse=[bool(frequency) for frequency in config["moe_layer_freq"]],
        experts=config["num_experts"],
        shared=config["shared_expert_intermediate_size"] is not None,
        router=Router(
            per_token=config["num_experts_per_tok"],
            bias="weights" if config["moe_router_enable_expert_bias"] else "",
        ),
    )


def qwen_shape(config: Mapping[str, Any]) -> Shape:
    """Qwen3-MoE, and SDAR-MoE, which is the same but for its mask."""
    dense, every = config["mlp_only_layers"], config["decoder_sparse_step"]
    layers = config["num_hidden_layers"]
    return Shape(
        dims=dims_of(config, -1),
        names=QWEN_NAMES,
        head_dim=config["head_dim"],
        rotary=config["head_dim"],
        qk_norm=True,
        sparse=[i not in dense and (i + 1) % every == 0 for i in range(layers)],
        experts=config["num_experts"],
        shared=False,
        router=Router(per_token=config["num_experts_per_tok"], normalize=config["norm_topk_prob"]),
    )


def greatest(scores: list[float], count: int) -> list[int]:
    """Indices of the greatest scores, best first, the lower one of equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def choose(scores: list[float], router: Router) -> list[int]:
    """The experts of one token, best first, by its scores of all (with their bias)."""
    size = len(scores) // router.groups
    allowed = set(range(len(scores)))
    if router.groups > 1:
        runs = [scores[g * size : (g + 1) * size] for g in range(router.groups)]
        # in float32, as upstream adds them
        sums = [float(torch.tensor(sorted(run)[-2:]).sum()) for run in runs]
        best = greatest(sums, router.top_groups)
        allowed = {g * size + i for g in best for i in range(size)}
    struck = [s if i in allowed else -float("inf") for i, s in enumerate(scores)]
    return greatest(struck, router.per_token)


def pooled(scores: list[list[float]], router: Router) -> list[list[float]]:
    """Scores of a row's tokens where experts that their window does not admit are struck out.

    A window admits the experts that score best in any of its tokens.
    """
    struck: list[list[float]] = []
    for start in range(0, len(scores), router.window):
        inside = scores[start : start + router.window]
        pool = greatest([max(column) for column in zip(*inside, strict=True)], router.capacity)
        struck.extend(
            [s if i in pool else -float("inf") for i, s in enumerate(row)] for row in inside
        )
    return struck


def route(
    x: Tensor, gate: Tensor, bias: Tensor | None, router: Router
) -> tuple[Tensor, Tensor]:  # [N, K] int64, [N, K] float32
    """Experts of one row's tokens x [N, d], best first, and the weight of each."""
    logits = x.float() @ gate.float().T  # [N, E]
    scores = logits.sigmoid() if router.score == "sigmoid" else logits.softmax(dim=-1)
    biased = scores if bias is None else scores + bias.float()
    rows = pooled(biased.tolist(), router) if router.capacity else biased.tolist()
    ids = torch.tensor([choose(row, router) for row in rows])
    weights = (biased if router.bias == "weights" else scores).gather(1, ids)
    if router.normalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return ids, weights * router.scale


class ExpertModel(OracleModel):
    """A transformer with experts; calling it gives raw logits [B, L, V] under full attention."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.shape = read_shape(config)
        self.dims = self.shape.dims
        self.names = self.shape.names
        self.weights = weights
        self.mask_id = self.dims.mask_id
        self.shifted = False

    def block_causal(self, tokens: list[int], block: int) -> Tensor:
        """Logits [L, V] where a token sees its block, cut from 0, and earlier ones."""
        place = torch.arange(len(tokens)) // block
        sees = place[None, :] <= place[:, None]
        return self.forward(torch.tensor([tokens]), sees=sees).logits[0].float()

    def routed(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Experts [N, K] and weights [N, K] of a row's tokens x [N, d], from a layer's router."""
        prefix = self.names["layer"].format(layer)
        bias = self.weights[prefix + self.names["bias"]] if self.shape.router.bias else None
        return route(x, self.weights[prefix + "mlp.gate.weight"], bias, self.shape.router)

    def experts(self, x: Tensor, layer: int) -> Tensor:
        """What a layer's routed experts make of a row x [N, d], without the shared one."""
        ids, weights = self.routed(x, layer)
        prefix = self.names["layer"].format(layer) + "mlp.experts."
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in range(self.shape.experts):
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            if len(tokens):
                rows = self._gated(x[tokens], f"{prefix}{expert}.").float()
                out[tokens] += rows * weights[tokens, places][:, None]
        return out.to(x.dtype)

    def shared(self, x: Tensor, layer: int) -> Tensor:
        """What a layer's shared expert makes of tokens x [..., d]."""
        return self._gated(x, f"{self.names['layer'].format(layer)}{self.names['shared']}.")

    def _turning(self, head_dim: int) -> int:
        return self.shape.rotary

    def _heads(self, x: Tensor, prefix: str, which: str) -> Tensor:
        size = {"q": self.dims.heads, "k": self.dims.kv_heads, "v": self.dims.kv_heads}
        flat = self._packed(x, prefix, which) if "packed" in self.names else None
        if flat is None:
            flat = self._linear(x, prefix + self.names[which])
        heads = flat.view(*flat.shape[:-1], size[which], self.shape.head_dim)
        if which != "v" and self.shape.qk_norm:
            heads = self._norm(heads, prefix + self.names[which + "_norm"])
        return heads.transpose(1, 2)  # [B, count, Q, D]

    def _packed(self, x: Tensor, prefix: str, which: str) -> Tensor:
        # one product whose rows are all queries, then all keys, then all values
        q, kv = (n * self.shape.head_dim for n in (self.dims.heads, self.dims.kv_heads))
        parts = self._linear(x, prefix + self.names["packed"]).split([q, kv, kv], dim=-1)
        return parts["qkv".index(which)]

    def _mlp(self, hidden: Tensor, prefix: str) -> Tensor:
        normed = self._norm(hidden, prefix + self.names["mlp_norm"])
        layer = int(prefix.rstrip(".").rpartition(".")[2])
        if not self.shape.sparse[layer]:
            return self._gated(normed, prefix + "mlp.")
        out = torch.stack([self.experts(row, layer) for row in normed])
        if self.shape.shared:
            out = out + self.shared(normed, layer)
        return out

    def _gated(self, x: Tensor, prefix: str) -> Tensor:
        gate = F.silu(self._linear(x, prefix + "gate_proj"))
        return self._linear(gate * self._linear(x, prefix + "up_proj"), prefix + "down_proj")


def load(path: str | Path, **changes: Any) -> ExpertModel:
    """Loads a Hugging Face directory in float32, with some settings changed."""
    config, weights = read(path)
    config |= changes
    return ExpertModel(config, {name: w.float() for name, w in weights.items()})
