"""A paged K,V store with NaN wherever nothing was written, and spans to attend in it."""

import torch
from torch import Tensor

from dllmserve.core.plan import Mask, Span, SpanField
from dllmserve.core.plan import Store as How
from dllmserve.kernels.attention import span_attention, store_pages

Slots = dict[int, tuple[Tensor, Tensor]]


class Store:
    """One layer's cache. ``rows[r]`` holds what the slots of row r should hold.

    The last row is trash, as in the state table.
    """

    def __init__(
        self,
        heads: tuple[int, int, int],
        device: torch.device,
        *,
        page: int = 5,
        slots: int = 100,
        rows: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.heads, self.kv_heads, self.dim = heads
        self.scale = self.dim**-0.5
        self.device, self.dtype, self.page = device, dtype, page
        self.generator = torch.Generator().manual_seed(seed)
        per_row = -(-slots // page)
        shape = ((rows * per_row + 1) * page, self.kv_heads, self.dim)
        self.k = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.v = torch.full(shape, torch.nan, dtype=dtype, device=device)
        pages = torch.randperm(rows * per_row, generator=self.generator) + 1
        table = torch.zeros(rows + 1, per_row, dtype=torch.int64)
        table[:rows] = pages.view(rows, per_row)
        self.table = table.to(device)
        self.rows: dict[int, Slots] = {}

    def random(self, count: int, heads: int) -> Tensor:
        """[count, heads, D] on the host."""
        return torch.randn(count, heads, self.dim, generator=self.generator).to(self.dtype)

    def places(self, row: int, count: int) -> Tensor:
        """Places in the cache of a row's first slots [count]."""
        position = torch.arange(count, device=self.device)
        return self.table[row, position // self.page] * self.page + position % self.page

    def fill(self, row: int, count: int) -> None:
        """Write the first slots of a row."""
        k, v = self.random(count, self.kv_heads), self.random(count, self.kv_heads)
        self.rows[row] = {i: (k[i], v[i]) for i in range(count)}
        places = self.places(row, count)
        self.k[places], self.v[places] = k.to(self.device), v.to(self.device)

    def fresh(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [tokens, H, D] on the host."""
        return (
            self.random(tokens, self.heads),
            self.random(tokens, self.kv_heads),
            self.random(tokens, self.kv_heads),
        )

    def attend(
        self,
        spans: list[Span],
        fresh: tuple[Tensor, Tensor, Tensor],
        *,
        skip_whole: bool = False,
        window: int = 0,
        strided: bool = False,
        padding: int = 0,
    ) -> Tensor:
        """Output [N, Hq, D] on the host; NaN where the kernel wrote nothing."""
        q, k, v = (x.to(self.device) for x in fresh)
        if strided:  # views of one fused projection
            sizes = (self.heads, self.kv_heads, self.kv_heads)
            q, k, v = torch.cat((q, k, v), dim=1).split(sizes, dim=1)
        out = torch.full(fresh[0].shape, torch.nan, dtype=self.dtype, device=self.device)
        fields, starts = self.packed(spans, padding)
        longest = max(s.q_len for s in spans) + 2 * padding  # an upper bound is enough
        where = (fields, starts, self.table, self.page, longest)
        how = {"scale": self.scale, "window": window, "skip_whole": skip_whole}
        span_attention(q, k, v, out, self.k, self.v, *where, **how)
        if skip_whole:
            store_pages(k, v, self.k, self.v, *where)
        return out.cpu()

    def packed(self, spans: list[Span], padding: int = 0) -> tuple[Tensor, Tensor]:
        """Fields [S, len(SpanField)] and starts [S] int32, the padding spans last."""
        empty = Span(len(self.table) - 1, *[0] * (len(SpanField) - 1))
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + span.q_len)
        fields = torch.tensor([*spans, *[empty] * padding], dtype=torch.int32)
        first = starts[:-1] + [starts[-1]] * padding
        return fields.to(self.device), torch.tensor(first, dtype=torch.int32, device=self.device)

    def check_slots(self) -> None:
        """Every slot holds what it should, all others are NaN."""
        for cache, side in ((self.k.cpu(), 0), (self.v.cpu(), 1)):
            expected = torch.full_like(cache, torch.nan)
            for row, known in self.rows.items():
                places = self.places(row, max(known, default=-1) + 1).tolist()
                for slot, pair in known.items():
                    expected[places[slot]] = pair[side]
            assert torch.equal(cache.nan_to_num(nan=9e9), expected.nan_to_num(nan=9e9))


def span(row: int, start: int, length: int, ctx: int, store: How, **more: int) -> Span:
    """A span; ``stair`` and ``blind`` say its mask."""
    base = {"blk_len": length} | more
    for name, mask in (("stair", Mask.STAIR), ("blind", Mask.BLIND)):
        if name in base:
            base |= {"mask": mask, "mask_arg": base.pop(name)}
    return Span(row, start, length, ctx, store, **base)
