"""ModelSpec: everything the engine must know about a checkpoint, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions and special ids of a checkpoint, read from its config.json.

    Attributes:
        architecture: ``architectures[0]`` of config.json.
        vocab_size: ids a prompt may contain are ``0 .. vocab_size - 1``.
        embedding_size: rows of the embedding and of the LM head, >= vocab_size.
        logit_shift: 1 if position i's hidden state predicts token i + 1 (Dream), else 0.
        mask_id: id fed to the model at masked positions.
        eos_ids: every id that ends an answer.
        turn_end_ids: those of them that end a turn and no text, as chat templates write them
            after what the assistant said (``<|eot_id|>``, ``<|im_end|>``).
        geometry: which positions see which: "full", all; "block", those of their own block and of
            earlier ones; "causal", themselves and earlier ones.
        block_length: the checkpoint's own block, in tokens; 1 if causal, 0 with full attention.
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
    qkv_bias: bool = False
    tied_head: bool = False
    dtype: str = "bfloat16"
    weights: int = 0
    geometry: str = "full"
    block_length: int = 0

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
