"""ModelSpec: everything the engine must know about a checkpoint, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

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
class ModelSpec:
    """Dimensions and special ids of a checkpoint, read from its config.json.

    Attributes:
        architecture: ``architectures[0]`` of config.json.
        vocab_size: ids a prompt may contain are ``0 .. vocab_size - 1``.
        embedding_size: rows of the embedding and of the LM head, >= vocab_size.
        rope_theta, rope_scaling: base of the rotary angles, and what else they depend on.
        logit_shift: 1 if position i's hidden state predicts token i + 1 (Dream, autoregressive
            models), else 0.
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
    qkv_bias: bool = False
    tied_head: bool = False
    dtype: str = "bfloat16"
    weights: int = 0

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
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def parameters(self) -> int:
        """Number of weights."""
        return self.weights
