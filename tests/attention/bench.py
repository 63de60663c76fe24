"""A K,V store with known contents, on which a backend is compared with the naive loops."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dllmserve.attention.backend import AttentionBackend, KVStore, unpadded_step
from dllmserve.catalog import BACKENDS
from dllmserve.core.model_spec import AttentionSpec
from dllmserve.core.plan import Mask, Span, StepEntry, StepPlan, Store
from dllmserve.core.rows import RowSelect
from tests.attention.naive import Slots, attend, keep
from tests.helpers import PLAIN

LENGTH = 24  # slots of a row
#: layers as of a model with windows: few large heads see all, more smaller ones do not
LAYERS = (
    AttentionSpec(num_kv_heads=2, head_dim=16, window=16),
    AttentionSpec(num_kv_heads=1, head_dim=32),
)
HEADS = [(4, 4, 8), (4, 2, 8), (3, 1, 6), (6, 2, 4), (1, 1, 16)]
AHEAD = Store.AHEAD
CPU = torch.device("cpu")


class Bench:
    """Rows whose slots are known, with shuffled pages and NaN wherever nothing was written.

    Of two layers, ``layer`` is the one that attends. ``attention`` says how layers do, if not all
    do as ``heads`` says (query heads, K,V heads, head size); ``scale`` is the model's query_scale.
    """

    def __init__(
        self,
        heads: tuple[int, int, int],
        name: str,
        shift: int,
        page: int,
        device: torch.device = CPU,
        *,
        attention: tuple[AttentionSpec, ...] = (),
        scale: float = 0.0,
        layer: int = 1,
        length: int = LENGTH,
    ) -> None:
        self.device, self.layer, self.length = device, layer, length
        # on a CPU the reference backend keeps what torch.topk picks of equal scores
        self.ties = "topk" if name == "sdpa" and device == CPU else "position"
        self.heads, kv_heads, dim = heads
        self.spec = replace(
            PLAIN,
            num_heads=self.heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            num_layers=2,
            logit_shift=shift,
            attention=attention,
            query_scale=scale,
        )
        own = self.spec.layers[layer]
        self.kv_heads, self.dim, self.window = own.num_kv_heads, own.head_dim, own.window
        self.backend: AttentionBackend = BACKENDS[name].load()(self.spec)
        if reasons := self.backend.unsupported(self.spec, device):
            pytest.skip("; ".join(reasons))
        self.rows: dict[int, Slots] = {}
        self.generator = torch.Generator().manual_seed(sum(heads) + page)
        per_row = -(-length // page)
        self.kv = KVStore.create(
            self.spec,
            num_pages=8 * per_row,
            page_size=page,
            num_rows=8,
            pages_per_row=per_row,
            dtype=torch.float32,
            device=device,
        )
        for side in (*self.kv.k, *self.kv.v):
            side.fill_(torch.nan)
        pages = torch.randperm(8 * per_row, generator=self.generator) + 1
        self.kv.page_table[:8] = pages.view(8, per_row).to(device)

    def random(self, count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, self.dim, generator=self.generator)

    def fill(self, row: int, length: int) -> None:
        """Write slots 0..length - 1 of a row, in one layer only."""
        k, v = self.random(length, self.kv_heads), self.random(length, self.kv_heads)
        self.rows[row] = {i: (k[i], v[i]) for i in range(length)}
        slots = self.slots(row, list(range(length)))
        self.kv.k[self.layer][slots] = k.to(self.device)
        self.kv.v[self.layer][slots] = v.to(self.device)

    def slots(self, row: int, positions: list[int]) -> Tensor:
        """Slots [n] in the store of a row's positions."""
        wanted = torch.tensor(positions, dtype=torch.int64, device=self.device)
        return self.kv.slots(torch.tensor([row], device=self.device), wanted)[0]

    def check(self, spans: list[Span], selects: dict[int, RowSelect]) -> None:
        """Attend a plan in the layer and compare outputs and slots with the naive loops."""
        plan = StepPlan(tuple(StepEntry(s, None, 0, "steps") for s in spans))
        # a plan has what reads a span stored ahead in the same entry; here it has its own
        if all(span.store != AHEAD for span in spans):
            plan.validate(self.length)
        q = self.random(plan.tokens, self.heads)
        k, v = self.random(plan.tokens, self.kv_heads), self.random(plan.tokens, self.kv_heads)
        moved = [t.to(self.device) for t in (q, k, v)]
        context = self.backend.prepare(unpadded_step(plan, self.kv, selects))
        out = context.attend(self.layer, *moved).cpu()
        assert out.shape == q.shape
        ends = [0]
        for span in spans:
            ends.append(ends[-1] + span.q_len)
        # what is stored first is there for all spans, blind ones of the same row among them
        order = sorted(zip(spans, pairwise(ends), strict=True), key=lambda s: s[0].store != AHEAD)
        for span, (low, high) in order:
            mine = slice(low, high)
            slots = self.rows.setdefault(span.row, {})
            how = (self.window, self.spec.scale_of(self.layer))
            expected = attend(span, q[mine], k[mine], v[mine], slots, *how)
            torch.testing.assert_close(out[mine], expected, atol=1e-5, rtol=1e-5)
            if span.selects:
                select, shift = selects[span.row], self.spec.logit_shift
                slots.update(keep(span, q[mine], k[mine], v[mine], select, shift, self.ties))
        self.check_slots()
        assert bool(self.kv.k[1 - self.layer].isnan().all())  # the other layer is untouched

    def check_slots(self) -> None:
        """Written slots hold what they should, all others are still NaN."""
        stored_k, stored_v = self.kv.k[self.layer].cpu(), self.kv.v[self.layer].cpu()
        written = torch.zeros(len(stored_k), dtype=torch.bool)
        written[: self.kv.page_size] = True  # trash
        for row, slots in self.rows.items():
            places = self.slots(row, list(slots)).tolist()
            for place, (k, v) in zip(places, slots.values(), strict=True):
                written[place] = True
                assert torch.equal(stored_k[place], k)
                assert torch.equal(stored_v[place], v)
        assert bool(stored_k[~written].isnan().all())
        assert bool(stored_v[~written].isnan().all())


def span(row: int, start: int, length: int, ctx: int, store: Store, **more: int) -> Span:
    """A span; ``stair`` and ``blind`` say its mask."""
    base = {"blk_len": length} | more
    for name, mask in (("stair", Mask.STAIR), ("blind", Mask.BLIND)):
        if name in base:
            base |= {"mask": mask, "mask_arg": base.pop(name)}
    return Span(row, start, length, ctx, store, **base)


def ahead_and_blind(bench: Bench) -> None:
    """Spans that are stored ahead, and blind ones of them, between spans of other kinds."""
    for row, length in ((1, 20), (2, 20), (3, LENGTH), (4, 13)):
        bench.fill(row, length)
    bench.check(
        [
            span(0, 0, 13, 13, AHEAD),  # a whole canvas
            span(1, 9, 5, 20, AHEAD),  # a block of one, twice the same shape
            span(2, 9, 5, 20, AHEAD),
            span(3, 6, 7, LENGTH, Store.POSITIONS),
            span(4, 8, 3, 8, Store.NONE),
            span(0, 8, 4, 13, Store.NONE, blk_len=0, blind=0),
            span(1, 9, 5, 20, Store.NONE, blk_len=0, blind=1),
            span(2, 9, 5, 20, Store.NONE, blk_len=0, blind=1),
        ],
        {},
    )
    bench.check(
        [span(3, 0, 1, LENGTH, AHEAD), span(3, 0, 9, 9, Store.NONE, blk_len=0, blind=0)], {}
    )


def windows(bench: Bench) -> None:
    """Prompts in causal chunks, and canvases behind contexts much longer than the window."""
    for row, length in ((1, 150), (2, 150), (3, 200), (4, 9), (5, 131)):
        bench.fill(row, length)
    bench.check(
        [
            span(0, 0, 90, 0, Store.POSITIONS, stair=1),  # a prompt, or its first chunk
            span(1, 150, 20, 150, Store.NONE),  # canvases longer than the window
            span(2, 150, 20, 150, Store.NONE),
            span(3, 200, 10, 200, Store.POSITIONS, stair=1),  # a finished canvas
            span(4, 9, 18, 9, Store.NONE),  # less behind it than a window
            span(5, 131, 1, 131, Store.POSITIONS, stair=1),
            span(6, 0, 18, 0, Store.NONE),  # nothing behind it
        ],
        {},
    )
    bench.check(
        [
            span(0, 90, 75, 90, Store.POSITIONS, stair=1),  # the second chunk
            span(3, 210, 5, 210, Store.NONE),
            span(1, 100, 9, 150, Store.POSITIONS, stair=4),  # blocks over what was there
            span(2, 100, 9, 150, Store.POSITIONS),
        ],
        {},
    )
    bench.check([span(0, 165, 16, 165, Store.NONE)], {})


def mixed_plans(bench: Bench) -> None:
    """Two steps that hold every write mode, ragged and with equal neighbours."""
    for row, length in ((1, 9), (2, 9), (3, LENGTH), (4, 13)):
        bench.fill(row, length)
    selects = {5: RowSelect(3, 4), 6: RowSelect(3, 4), 7: RowSelect(2, 8)}
    bench.check(
        [
            span(0, 0, 7, 0, Store.NONE),  # nothing cached
            span(1, 9, 5, 9, Store.NONE),  # prefix reuse, twice the same shape
            span(2, 9, 5, 9, Store.NONE),
            span(3, 6, 7, LENGTH, Store.POSITIONS),  # dual reuse in the middle
            span(4, 0, 13, 0, Store.POSITIONS),  # refresh over what was there
            span(5, 0, 17, 0, Store.SELECT_PER_HEAD, keep=6, blk_off=5, blk_len=4),
            span(6, 0, 17, 0, Store.SELECT_PER_HEAD, keep=6, blk_off=5, blk_len=4),
            span(7, 0, 15, 0, Store.SELECT_SHARED, keep=4, blk_off=9, blk_len=3),
        ],
        selects,
    )
    bench.check(
        [
            span(4, 11, 2, 13, Store.POSITIONS),  # dual reuse at the end
            span(5, 5, 4, 6, Store.NONE),  # sparse reuse of what was kept
            span(6, 4, 5, 6, Store.NONE, blk_off=1, blk_len=4),
            span(7, 9, 3, 4, Store.NONE),
            span(0, 3, 1, 0, Store.NONE),  # one query that sees itself only
        ],
        selects,
    )
