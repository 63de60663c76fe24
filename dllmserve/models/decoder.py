"""The pre-norm decoder; an architecture is a class that composes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from dllmserve.core.model_spec import ModelSpec
from dllmserve.layers.modules import (
    Attention,
    AttentionContext,
    Build,
    Embedding,
    Head,
    Mlp,
    RMSNorm,
)


class CanvasTokens(NamedTuple):
    """What a step's tokens are to a model that fills canvases of noise.

    Attributes:
        mine: [N] bool, tokens of a canvas that is being filled; the others are encoded for good.
        expected: [N, d], what the forward before thought of the position: the mean of the
            embedding's rows by its distribution; zeros where there is none.
    """

    mine: Tensor
    expected: Tensor


@dataclass(frozen=True)
class Block:
    """A layer; what attention and the MLP give is added to the residual stream.

    Attributes:
        attention_norm, attention, mlp_norm: the layer's.
        mlp: [N, d] to [N, d].
        pooled: it takes the numbers of the tokens' windows [N] as well, see
            :class:`~dllmserve.layers.experts.Experts`.
    """

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: Callable[..., Tensor]
    pooled: bool = False

    def __post_init__(self) -> None:
        self.attention_norm.scales = self.attention.qkv.scales
        # experts have a router, which is not quantized
        self.mlp_norm.scales = isinstance(self.mlp, Mlp) and self.mlp.gate_up.scales


class Decoder(ABC):
    """Embedding, blocks and final norm; the LM head is a weight, applied elsewhere.

    An architecture is a subclass in a file of its own, and a line in :mod:`dllmserve.catalog`. It
    reads config.json in ``read``, and makes its modules in ``__init__``, in the order of the
    forward.

    Args:
        build: what modules are made with.

    Attributes:
        embedding, blocks, norm, head: the modules.
        spec: dimensions of the whole model.
        group: the ranks that share it.
        vocab: this rank's ids.
        ops: the operations that the modules are made of.
        weights: of all modules.
        ignored: parts of names of tensors that a checkpoint may hold and that nothing needs.

    Example:
        ``hidden = decoder(ids, positions, context)`` with ids and positions [N] int64
        gives [N, hidden_size]; ``hidden @ decoder.head.weight.T`` are the logits.
    """

    embedding: Embedding
    blocks: list[Block]
    norm: RMSNorm
    head: Head

    def __init__(self, build: Build) -> None:
        self.spec, self.group, self.vocab = build.spec, build.group, build.vocab
        self.ops, self.weights, self.ignored = build.ops, build.weights, build.ignored

    @classmethod
    @abstractmethod
    def read(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json. Raises UnsupportedModelError on options we do not run."""

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
        canvas: CanvasTokens | None = None,
    ) -> Tensor:
        """Run N packed tokens of any number of requests.

        Args:
            ids: [N] int64 token ids.
            positions: [N] int64 canvas positions.
            context: attention for this step.
            rows: [M] int64, the tokens whose result is wanted; None for all of them. What
                follows the last layer's attention is computed for these alone, but for experts
                with a capacity, which need all tokens of a window.
            canvas: of a model with ``spec.noise`` alone; None if no token is of a canvas that is
                being filled.

        Returns:
            [M, hidden_size] (or [N, hidden_size]) after the final norm.
        """
        angles, windows = self.ops.at(positions), self._windows(positions)
        narrow = len(self.blocks) - 1 if windows is None else None
        # every addition to the residual stream h runs together with the norm that follows it;
        # all in one frame, for a caller's names would keep tensors that a layer no longer needs
        x: Any = self.embedding(ids)  # and what norms give, which may be in e4m3
        h: Any = None
        for layer, block in enumerate(self.blocks):
            wanted = rows if layer == narrow else None
            x, h = block.attention_norm(x, h)
            x = block.attention(x, angles, context, wanted)
            if wanted is not None:
                h = h[wanted]
            x, h = block.mlp_norm(x, h)
            x = block.mlp(x, windows) if block.pooled else block.mlp(x)
        if windows is not None and rows is not None:
            x, h = x[rows], h[rows]
        return cast(Tensor, self.norm(x, h)[0])

    def _windows(self, positions: Tensor) -> Tensor | None:
        """The number of each token's window [N] int64, where experts have a capacity.

        Tokens of a request follow each other from a window's first position on, so a window begins
        wherever one of these is. Each token of padding, at position 0, is one by itself. A step
        that only measures memory may begin anywhere.
        """
        experts = self.spec.experts
        if experts is None or not experts.capacity:
            return None
        return ((positions % experts.window == 0).cumsum(0) - 1).clamp(min=0)
