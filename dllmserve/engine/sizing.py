"""Sizing: what an engine's memory depends on, and the bytes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dllmserve._values import MAX_STOP_IDS
from dllmserve.config import EngineConfig
from dllmserve.core.budget import MemoryBudget
from dllmserve.core.model_spec import ModelSpec
from dllmserve.runtime.edits import EditSizes, edit_bytes


def memory_advice(spec: ModelSpec) -> str:
    """What helps in general; :mod:`dllmserve.engine.advice` says which of it, and to what."""
    sparse = "use sparse attention, " if spec.geometry == "full" else ""
    return (
        f"reduce max_model_len, {sparse}enable tensor parallelism (tensor_parallel_size), or lower "
        "max_num_seqs, max_num_batched_tokens, max_logit_rows or max_history_rows"
    )


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The choices that decide how much memory an engine takes.

    Attributes:
        options: as asked for.
        spec: the model, or a rank's part of it, with its weights counted.
        dtype: of weights, activations and K,V.
        tokens: query tokens of the largest step.
        max_len: longest canvas.
        fused: Triton kernels read pages in place and reduce logits in one pass; plain torch
            operations gather and copy.
        in_e4m3: of the weights those that are quantized, and the factors of their rows.
    """

    options: EngineConfig
    spec: ModelSpec
    dtype: torch.dtype
    tokens: int
    max_len: int
    fused: bool
    in_e4m3: tuple[int, int] = (0, 0)

    def bare(self) -> MemoryBudget:
        """Bytes of everything but the pages, on a device of no size yet."""
        size = self.dtype.itemsize
        return MemoryBudget(
            total=0,
            free=0,
            utilization=self.options.gpu_memory_utilization,
            weights=self._weights(),
            activations=self.tokens * self._widest * size,
            logits=self._logits(),
            tables=self._tables(),
            history=self._history(),
            pages=0,
        )

    def with_pages(self, bare: MemoryBudget) -> tuple[MemoryBudget, int]:
        """The plan with K,V pages, and their number: as many as fit, or as the options say.

        More than ``max_num_seqs`` canvases are never needed.
        """
        pages = self.options.kv_pages
        if pages is None:
            wanted = self.options.max_num_seqs * self._canvas_pages
            room = max(bare.allowed - bare.fixed, 0)
            pages = min(wanted, room // (self.page_bytes + self.gather_bytes))
        memory = replace(
            bare,
            activations=bare.activations + pages * self.gather_bytes,
            pages=pages * self.page_bytes,
        )
        return memory, pages

    def least(self) -> int:
        """Bytes of the plan with the pages that were asked for, or those of one canvas."""
        pages = self.options.kv_pages
        if pages is None:
            pages = self._canvas_pages
        return self.bare().fixed + pages * (self.page_bytes + self.gather_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers together."""
        return self.options.page_size * self.spec.kv_values() * self.dtype.itemsize

    @property
    def gather_bytes(self) -> int:
        """Bytes that a step needs per page beside it.

        In torch, a layer gathers the context of a step's reuse spans, at worst all pages,
        and joins it with the fresh K,V: twice the largest layer's share of the pages.
        """
        if self.fused:
            return 0
        most = max(2 * layer.num_kv_heads * layer.head_dim for layer in self.spec.layers)
        return 2 * self.options.page_size * most * self.dtype.itemsize

    @property
    def _canvas_pages(self) -> int:
        return -(-self.max_len // self.options.page_size)

    def _weights(self) -> int:
        """Weights: in the dtype, or a byte each and a float32 factor for each row."""
        numbers, factors = self.in_e4m3
        return (self.spec.weights - numbers) * self.dtype.itemsize + numbers + 4 * factors

    def _logits(self) -> int:
        """Logits of max_logit_rows rows and what their statistics need beside them."""
        # torch: float32 logits, candidates, shifted, exponentials, weights; with entropy two
        # more. Triton: the sorting of filtered rows, which come in smaller chunks
        extra = 4 if self.fused else 7 * 4
        values = self.options.max_logit_rows * self.spec.embedding_size
        return values * (self.dtype.itemsize + extra)

    def _tables(self) -> int:
        """State table (ids, flags, what rules keep, biases), page and rotary tables."""
        length = self.max_len
        pages = length // self.options.page_size
        ends = len(self.spec.eos_ids)
        per_row = length * 26 + pages * 8 + (2 * ends + MAX_STOP_IDS) * 8
        per_row += 2 * self.canvas_len * self.spec.hidden_size * self.dtype.itemsize
        rows = (self.options.max_num_seqs + 1) * per_row
        edits = edit_bytes(self.edit_sizes, keeps=False)
        return rows + edits + length * self._angles * 4

    @property
    def _angles(self) -> int:
        """Numbers of rotary tables of a position."""
        kinds = {(layer.head_dim, layer.rope_theta, layer.turned) for layer in self.spec.attention}
        return sum(dim for dim, *_ in kinds) if kinds else self.spec.rotated

    def _history(self) -> int:
        """What rules keep of logits."""
        return edit_bytes(self.edit_sizes, keeps=True)

    @property
    def canvas_len(self) -> int:
        """Positions of the longest canvas of noise; 0 for models without."""
        return self.spec.block_length if self.spec.noise else 0

    @property
    def history_rows(self) -> int:
        """Distributions that may be kept: no rule for canvases of noise does so."""
        return 0 if self.spec.noise else self.options.max_history_rows

    @property
    def edit_sizes(self) -> EditSizes:
        """What logit edits take depends on this."""
        options = self.options
        return EditSizes(
            rows=options.max_num_seqs + 1,
            slots=self.history_rows,
            max_len=self.max_len,
            ids=self.spec.embedding_size,
            spec=self.spec,
        )

    @property
    def _widest(self) -> int:
        """Numbers per token in the widest moment of a layer."""
        spec = self.spec
        # attention holds q, k, v twice (before and after the rotation) and its output
        attention = max(
            (3 * spec.num_heads + 4 * layer.num_kv_heads) * layer.head_dim for layer in spec.layers
        )
        # the MLP holds gate, up and their product; the residual stream and its norm are always
        # there
        inner = max(3 * spec.mlp_size, attention)
        if self.dtype == torch.float32:  # in which ranks gather each other's
            inner *= self.options.tensor_parallel_size
        # beside the MLP's output, experts see the stream by two norms more
        stream = 5 if spec.experts is not None and spec.experts.beside else 3
        return max(inner, self._of_experts) + stream * spec.hidden_size

    @property
    def _of_experts(self) -> int:
        """Numbers per token in the widest moment of a layer's experts."""
        experts, width = self.spec.experts, self.spec.hidden_size
        if experts is None or not any(experts.layers):
            return 0
        pairs, size = experts.per_token + bool(experts.shared_size), experts.size
        # gate and up, and their product; or that, each pair's output, and their sum in float32
        wide = width * 4 // self.dtype.itemsize
        if self.dtype != torch.float32:
            return max(3 * pairs * size, pairs * (size + width) + 2 * wide)
        if self.options.expert_parallel:  # ranks exchange the outputs of all pairs
            return pairs * (size + 3 * width)
        ranks = self.options.tensor_parallel_size  # each gathers the products, and has some outputs
        return max(3 * pairs * size, pairs * (size * ranks + width // ranks) + 2 * width)
