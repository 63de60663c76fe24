"""ModelSpec: everything the engine must know about a checkpoint, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

#: mask_id of a model that knows no mask: it equals no token
NO_MASK = -1


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary angles differ from those of the base alone; transformers defines the kinds.

    Attributes:
        kind: "linear" divides all frequencies by the factor. "llama3" and "yarn" divide those that
            turn less often than ``low`` times in ``original_len`` positions, leave those that turn
            more often than ``high`` times, and blend in between. "default" leaves them all.
        factor: see kind.
        original_len: positions that the model was first trained with.
        low, high: low_freq_factor and high_freq_factor of llama3, beta_slow and beta_fast of yarn.
        truncate: yarn blends between whole dimensions.
        attention_factor: cos and sin are multiplied by it.
        query_beta: the query at position p is multiplied by
            ``1 + query_beta * log(1 + p // original_len)`` (Ministral 3's llama_4_scaling_beta).
    """

    kind: str
    factor: float = 1.0
    original_len: int = 0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    query_beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Mixture of experts: MLPs of which each token takes a few, chosen by a router.

    The router's logits are one product of the hidden state. Scores come from them, some experts
    are chosen by their scores, and what these give is summed with weights, in the order of the
    choice; of equal scores the expert with the smaller number comes first.

    Attributes:
        layers: of each layer, whether it has experts, in place of its MLP; ``ModelSpec.mlp_size``
            is the width of the others.
        beside: they stand beside the MLP, not in its place (Gemma).
        count: routed experts of a layer.
        per_token: of which each token takes so many.
        size: inner width of each.
        shared_size: inner width of the expert that every token takes beside them, with weight 1;
            0 for none.
        score: "softmax" over the logits of all experts, or "sigmoid" of each.
        normalize: weights are divided by their sum + 1e-20.
        scale: weights are then multiplied by it.
        bias: of the scores: "choice" for the choice alone (LLaDA2), "weights" also in the weights
            (LLaDA-MoE), "" for none.
        groups: experts are so many runs of equal length, and are chosen in the ``top_groups`` best
            runs; a run's score is the sum of its two largest.
        top_groups: see there.
        capacity: the tokens of a window take no more than so many experts among them, those whose
            score is best in any of its tokens; 0 for no bound (LLaDA2.2).
        window: positions of a window, cut from 0 on in each request, if there is a capacity. Each
            forward then computes whole windows.
    """

    layers: tuple[bool, ...]
    count: int
    per_token: int
    size: int
    shared_size: int = 0
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    bias: str = ""
    groups: int = 1
    top_groups: int = 1
    capacity: int = 0
    window: int = 0
    beside: bool = False

    @property
    def everywhere(self) -> bool:
        """True if no layer has an MLP."""
        return all(self.layers) and not self.beside


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention of one layer.

    Attributes:
        num_kv_heads, head_dim: of the layer; the number of query heads is the model's.
        window: 0, or a query sees no more than so many positions up to its own. What is filled as
            one frame or canvas sees all of itself, and ``window - 1`` positions before it.
        rope_theta: base of the layer's rotary angles.
        turned: so many of the ``head_dim / 2`` pairs of dimensions (i, i + head_dim / 2) are
            rotated, the first ones; 0 for all.
        key_is_value: values are the keys before their norm and rotation, without a matrix of their
            own.
    """

    num_kv_heads: int
    head_dim: int
    window: int = 0
    rope_theta: float = 10000.0
    turned: int = 0
    key_is_value: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions and special ids of a checkpoint, read from its config.json.

    Attributes:
        architecture: ``architectures[0]`` of config.json.
        vocab_size: ids a prompt may contain are ``0 .. vocab_size - 1``.
        embedding_size: rows of the embedding and of the LM head, >= vocab_size.
        mlp_size: inner width of the MLPs, of which a model whose layers all have experts has none.
        experts: None for a model without experts.
        rope_theta, rope_scaling: base of the rotary angles, and what else they depend on.
        attention: of each layer, where layers differ in it; () where ``num_kv_heads``,
            ``head_dim``, ``rope_theta`` and the like say it of all.
        query_scale: scores are multiplied by it; 0 for ``head_dim ** -0.5``.
        rotary_dim: so many first dimensions of each head are rotated; 0 for all.
        head_norms: queries and keys are normalised in each head, before they are rotated.
        qkv_bias, out_bias: attention's matrices have a bias.
        logit_shift: 1 if position i's hidden state predicts token i + 1 (Dream, autoregressive
            models), else 0.
        activation: "silu" or "gelu_tanh", in MLPs and experts.
        logit_cap: logits z become ``cap * tanh(z / cap)``; 0 for none.
        noise: what is filled, a canvas of ``block_length`` positions, holds random ids in place of
            masks, and each forward is also fed what the one before thought of it (DiffusionGemma).
            ``mask_id`` is NO_MASK then, and ``causal_context`` is set.
        mask_id: id fed to the model at masked positions; NO_MASK in a "causal" model.
        geometry: which keys a query sees. "full": all of them. "block": those of its own block and
            of earlier ones, with blocks cut from position 0. "causal": none behind its own.
        block_length: of requests that give none: of a "block" model what the checkpoint is made
            for, which its weights do not depend on, or an option of the engine; 1 of a "causal"
            one; of a "full" one 0, which leaves it to the request, or an option of the engine.
        causal_context: a "block" model sees a block whole while it fills it alone: K and V that are
            kept, of the prompt and of blocks that are filled, are computed with a causal mask, and
            blocks are cut from the prompt's end on (Nemotron-Labs-Diffusion).
        short_blocks: a "block" model's answer ends where it was asked to, so its last block may be
            shorter, and a schedule's quotas are those of a block's masks. Else the last block is
            filled to its end, and quotas are those of a whole block (SDAR).
        eos_ids: every id that ends an answer.
        never_ids: ids that are not proposed, besides the mask's.
        turn_end_ids: those of them that end a turn and no text, as chat templates write them
            after what the assistant said (``<|eot_id|>``, ``<|im_end|>``).
        weights: numbers in all weights, counted on the model's modules when config.json is read.
    """

    architecture: str
    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_model_len: int
    rope_theta: float
    norm_eps: float
    mask_id: int
    eos_ids: tuple[int, ...]
    turn_end_ids: tuple[int, ...] = ()
    logit_shift: int = 0
    geometry: str = "full"
    block_length: int = 0
    causal_context: bool = False
    short_blocks: bool = False
    rope_scaling: RopeScaling | None = None
    attention: tuple[AttentionSpec, ...] = ()
    query_scale: float = 0.0
    rotary_dim: int = 0
    head_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    tied_head: bool = False
    dtype: str = "bfloat16"
    weights: int = 0
    experts: ExpertSpec | None = None
    never_ids: tuple[int, ...] = ()
    activation: str = "silu"
    logit_cap: float = 0.0
    noise: bool = False

    @cached_property
    def layers(self) -> tuple[AttentionSpec, ...]:
        """Attention of each layer."""
        if self.attention:
            return self.attention
        alike = AttentionSpec(
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, rope_theta=self.rope_theta
        )
        return (alike,) * self.num_layers

    def scale_of(self, layer: int) -> float:
        """What a layer's scores are multiplied by."""
        return self.query_scale or self.layers[layer].head_dim ** -0.5

    @property
    def rotated(self) -> int:
        """Dimensions of each head that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def fed_mask_id(self) -> int:
        """An id with an embedding for masked positions, also where nothing looks at it."""
        return max(self.mask_id, 0)

    @property
    def text_end_ids(self) -> tuple[int, ...]:
        """Ids that end the text, not just a turn."""
        return tuple(i for i in self.eos_ids if i not in self.turn_end_ids)

    def kv_values(self) -> int:
        """Numbers (not bytes) of K and V that one token takes, all layers together."""
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers)

    def parameters(self) -> int:
        """Number of weights."""
        return self.weights
