"""Logits of block-causal and autoregressive models: upstream's, in one span and in chunks."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve.attention.backend import KVStore, unpadded_step
from dllmserve.catalog import BACKENDS
from dllmserve.core.plan import Mask, Part, Span, StepEntry, StepPlan, Store
from dllmserve.models import loader
from dllmserve.models.decoder import Decoder
from dllmserve.parallel.group import SOLO, Group
from dllmserve.parallel.partition import Partition
from tests.helpers import GOLDEN, need_interpreter
from tests.ordered import use_ordered_products
from tests.parallel.threads import on_all, thread_groups

CPU = torch.device("cpu")
BLOCK = ("sdar-kv2of4", "sdar-tied-kv3of6", "fdv2-kv2of4", "fdv2-tied-kv1of3")
EXPERTS = ("sdarmoe-kv2of4", "llada2-g4e8", "llada21-g4e12", "llada2-maskprop", "qwen3moe-kv2of4")
CAUSAL = (
    "llama-kv2of4",
    "llama3rope-tied-kv2of6",
    "qwen2-kv2of4",
    "qwen2-tied-kv1of6",
    "qwen3-kv2of4",
    "qwen3-tied-kv1of3",
)
PAGE = 4


def forwards_of(name: str) -> list[dict[str, Any]]:
    cases = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    return [c for c in cases if c["kind"].endswith("forward")]


#: (model, index) of every forward
CASES = [(name, i) for name in (*BLOCK, *EXPERTS, *CAUSAL) for i in range(len(forwards_of(name)))]


def case_of(name: str, index: int) -> tuple[list[int], int, dict[str, Any]]:
    """Tokens, block length, and the case."""
    case = forwards_of(name)[index]
    return case["tokens"], case.get("block_length") or case.get("block_size") or 1, case


def load(
    folder: Path,
    group: Group = SOLO,
    kernels: str = "torch",
    dtype: torch.dtype = torch.float32,
    **shared: bool,
) -> Decoder:
    spec = loader.read_spec(loader.read_config(folder))
    options: dict[str, Any] = {"dtype": dtype, "device": CPU, "kernels": kernels}
    partition = Partition(spec, group, **shared)
    return loader.load_decoder(folder, partition, max_len=128, **options)


def chunk(start: int, end: int, block: int, store: Store = Store.POSITIONS, row: int = 0) -> Span:
    """Positions of a row against what has been stored before them."""
    stair = {"mask": Mask.STAIR, "mask_arg": block}
    return Span(row, start, end - start, start, store, head=Part.NONE, **stair)


class Forwards:
    """A decoder with pages for two rows of 128 positions."""

    def __init__(self, decoder: Decoder, backend: str = "sdpa") -> None:
        self.decoder = decoder
        local = Partition(decoder.spec, decoder.group).local
        self.backend = BACKENDS[backend].load()(local)
        pages = 128 // PAGE
        sizes: dict[str, Any] = {"num_pages": 2 * pages, "page_size": PAGE, "num_rows": 2}
        self.kv = KVStore.create(
            local, **sizes, pages_per_row=pages, dtype=torch.float32, device=CPU
        )
        self.kv.page_table[:2] = 1 + torch.arange(2 * pages).view(2, pages).flip(1)

    def hidden(self, tokens: list[int], *spans: Span) -> Tensor:
        """Of one step."""
        entries = tuple(StepEntry(span, None, 0, "steps") for span in spans)
        context = self.backend.prepare(unpadded_step(StepPlan(entries), self.kv))
        at = [p for s in spans for p in range(s.q_start, s.q_start + s.q_len)]
        ids = torch.tensor([tokens[p] for p in at])
        return self.decoder(ids, torch.tensor(at), context)

    def logits(self, tokens: list[int], *spans: Span) -> Tensor:
        """Of one step, the rank's part of the vocabulary."""
        return self.hidden(tokens, *spans) @ self.decoder.head.weight.T


def upstreams(z: Tensor, case: dict[str, Any]) -> None:
    expected = torch.tensor(case["logits"])
    rows = case.get("rows") or case["logits_rows"]
    assert float((z[rows, : expected.shape[1]] - expected).abs().max()) < 1e-4
    assert z.argmax(dim=-1).tolist() == case["argmax"]


def chunked(forwards: Forwards, tokens: list[int], block: int, length: int) -> Tensor:
    """All logits, from chunks of so many positions that are stored one after the other."""
    bounds = [*range(0, len(tokens), length), len(tokens)]
    spans = [chunk(a, b, block) for a, b in pairwise(bounds)]
    return torch.cat([forwards.logits(tokens, span) for span in spans])


@pytest.mark.parametrize(("name", "index"), CASES)
def test_one_span(name: str, index: int) -> None:
    tokens, block, case = case_of(name, index)
    z = Forwards(load(GOLDEN / name)).logits(tokens, chunk(0, len(tokens), block, Store.NONE))
    upstreams(z, case)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_chunks_against_stored_pages(name: str, index: int) -> None:
    tokens, block, case = case_of(name, index)
    decoder = load(GOLDEN / name)
    for length in {block, 2 * block, 32}:
        upstreams(chunked(Forwards(decoder), tokens, block, length), case)


@pytest.mark.parametrize("name", ["sdar-kv2of4", "fdv2-tied-kv1of3", "qwen3-tied-kv1of3"])
def test_a_block_that_is_not_stored_leaves_no_trace(name: str) -> None:
    """Forwards of a block before its tokens are final, and another row in the same step."""
    tokens, block, case = case_of(name, 0)
    forwards = Forwards(load(GOLDEN / name))
    start = (len(tokens) - 1) // block * block
    other = [*tokens[:start], *([1] * (len(tokens) - start))]
    forwards.logits(other, chunk(0, start, block))
    for _ in range(2):
        forwards.logits(other, chunk(start, len(tokens), block, Store.NONE))
    spans = (chunk(0, len(tokens), block, Store.NONE, row=1), chunk(start, len(tokens), block))
    whole, last = forwards.logits(tokens, *spans).split([len(tokens), len(tokens) - start])
    upstreams(whole, case)
    torch.testing.assert_close(last, whole[start:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["sdar-kv2of4", "fdv2-tied-kv1of3", "llama3rope-tied-kv2of6", "llada2-g4e8"]
)
def test_triton_kernels(name: str) -> None:
    """Of the layers and of attention, under the interpreter."""
    need_interpreter()
    tokens, block, case = case_of(name, 0)
    decoder = load(GOLDEN / name, kernels="triton")
    upstreams(chunked(Forwards(decoder, "triton"), tokens, block, 4 * block), case)


@pytest.mark.parametrize(
    ("name", "divided"),
    [
        ("sdar-kv2of4", False),
        ("fdv2-kv2of4", False),
        ("llama3rope-tied-kv2of6", False),
        ("qwen2-kv2of4", False),
        ("llada2-g4e8", False),
        ("qwen3moe-kv2of4", False),
        ("qwen3moe-kv2of4", True),
        ("sdarmoe-kv2of4", True),
    ],
)
def test_two_ranks_give_the_same_bits(
    name: str, divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_ordered_products(monkeypatch)
    tokens, block, case = case_of(name, 0)
    span = chunk(0, len(tokens), block)
    with torch.inference_mode():
        alone = Forwards(load(GOLDEN / name)).hidden(tokens, span)
    ranks = [
        Forwards(load(GOLDEN / name, group, expert_parallel=divided)) for group in thread_groups(2)
    ]
    both = on_all([lambda rank=rank: rank.hidden(tokens, span) for rank in ranks])  # type: ignore[misc]
    assert torch.equal(both[0], alone) and torch.equal(both[1], alone)
    upstreams(torch.cat([alone @ rank.decoder.head.weight.T for rank in ranks], dim=1), case)
