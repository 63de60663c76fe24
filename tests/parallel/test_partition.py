"""Who holds what: parts of weights and vocabularies, and which numbers of ranks work."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import AttentionSpec, ExpertSpec, ModelSpec
from dllmserve.engine.setup import plan_engine
from dllmserve.errors import ConfigError
from dllmserve.layers.modules import Part
from dllmserve.models import loader
from dllmserve.models.decoder import Decoder
from dllmserve.models.loader import (
    ASSETS,
    count_weights,
    load_decoder,
    outline,
)
from dllmserve.models.random import random_decoder
from dllmserve.parallel.group import Group
from dllmserve.parallel.partition import Partition, sizes
from dllmserve.parallel.vocab import VocabShard, first_id, split_width, splits_of
from tests.helpers import PLAIN
from tests.parallel.threads import ThreadGroup, thread_groups

CPU = torch.device("cpu")
SPEC = replace(PLAIN, hidden_size=24, num_heads=6, num_kv_heads=6, mlp_size=36, embedding_size=400)
EXPERTS = ExpertSpec(
    layers=(False, True),
    count=12,
    per_token=2,
    size=18,
    shared_size=18,
    score="sigmoid",
    bias="choice",
    groups=4,
    top_groups=2,
)
LLADA2 = replace(
    SPEC,
    architecture="LLaDA2MoeModelLM",
    num_layers=2,
    experts=EXPERTS,
    out_bias=True,
    head_norms=True,
)


@given(st.integers(1, 300_000), st.integers(1, 16))
def test_every_id_belongs_to_one_rank(size: int, ranks: int) -> None:
    bounds = [first_id(size, rank, ranks) for rank in range(ranks + 1)]
    assert bounds[0] == 0 and bounds[-1] == size and bounds == sorted(bounds)
    assert all(bound % 32 == 0 for bound in bounds[:-1])
    assert splits_of(size) <= 16 and splits_of(size) * split_width(size) >= size
    if splits_of(size) >= ranks:
        assert all(a < b for a, b in pairwise(bounds))


def test_ids_are_located() -> None:
    groups = thread_groups(3)
    shards = [VocabShard(400, group) for group in groups]
    ids = torch.arange(400)
    held = torch.stack([shard.locate(ids)[1] for shard in shards])
    assert held.sum(dim=0).tolist() == [1] * 400
    for shard in shards:
        columns, mine = shard.locate(ids)
        assert columns[mine].tolist() == list(range(shard.stop - shard.start))
        assert int(columns.min()) >= 0 and int(columns.max()) < shard.stop - shard.start


def parts_of(partition: Partition) -> dict[str, list[Part]]:
    """Every tensor of the checkpoint, and what a rank holds of it."""
    parts: dict[str, list[Part]] = {}
    for part, _ in places(outline(partition)):
        parts.setdefault(part.name, []).append(part)
    return parts


def places(decoder: Decoder) -> Iterator[tuple[Part, torch.Tensor]]:
    for weight in decoder.weights:
        yield from weight.places()


#: on every rank whole, and cut by columns where ranks add up products
WHOLE = ("norm", "ln_f", "mlp.gate.")
JOINED = ("attn_out.weight", "blocks.0.ff_out.weight", "dense.weight", "down_proj.weight")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize(
    ("spec", "divided"), [(SPEC, False), (LLADA2, False), (LLADA2, True)], ids=str
)
def test_parts_make_the_whole(spec: ModelSpec, divided: bool, size: int, exact: bool) -> None:
    """Put together along the dimension that was cut, they are the tensor again."""
    ranks = [Partition(spec, Group(rank, size), exact, divided) for rank in range(size)]
    held = [parts_of(rank) for rank in ranks]
    for rank in ranks:
        for part, rows in places(outline(rank)):
            assert rows.shape == part.held
    for name, pieces in parts_of(Partition(spec)).items():
        whole = torch.randn(pieces[0].shape)
        taken = [whole[part.cut] for i in range(len(pieces)) for part in (p[name][i] for p in held)]
        joined = name.endswith(JOINED) and not exact
        experts = divided and ".experts." in name
        if any(part in name for part in WHOLE) or (name.endswith("dense.bias") and not exact):
            assert all(torch.equal(tensor, whole) for tensor in taken)
        else:
            assert torch.equal(torch.cat(taken, dim=1 if joined and not experts else 0), whole)


def test_a_share_of_the_weights_is_a_share_of_the_memory() -> None:
    spec = loader.read_spec(loader.read_config(ASSETS / "llada-8b"))
    for size in (2, 4, 8):
        held = [count_weights(Partition(spec, Group(rank, size))) for rank in range(size)]
        norms = (2 * spec.num_layers + 1) * spec.hidden_size
        assert sum(held) == spec.parameters() + (size - 1) * norms
        assert max(held) < 1.02 * spec.parameters() / size


def spec_of(name: str) -> ModelSpec:
    return loader.read_spec(loader.read_config(ASSETS / name))


def test_layers_with_their_own_heads_are_cut_too() -> None:
    attention = tuple(AttentionSpec(num_kv_heads=n, head_dim=d) for n, d in ((6, 4), (2, 8)))
    spec = replace(SPEC, num_layers=2, attention=attention)
    local = Partition(spec, Group(1, 2)).local
    assert [(a.num_kv_heads, a.head_dim) for a in local.layers] == [(3, 4), (1, 8)]
    assert 2 * local.kv_values() == spec.kv_values() == 2 * (6 * 4 + 2 * 8)
    assert sizes(spec) == [1, 2]
    with pytest.raises(ConfigError, match="2 and 6 K,V heads"):
        Partition(spec, Group(0, 3))


def test_sizes_that_work() -> None:
    assert sizes(spec_of("llada-8b")) == [1, 2, 4, 8, 16]
    assert sizes(spec_of("dream-7b")) == [1, 2, 4]
    assert sizes(SPEC) == [1, 2, 3, 6]
    with pytest.raises(ConfigError) as error:
        Partition(SPEC, Group(0, 4))
    for part in ("tensor_parallel_size=4", "6 heads", "MLP size 36", "what works: 1, 2, 3, 6"):
        assert part in str(error.value)


def test_the_door_says_which_sizes_work() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=5 .* what works: 1, 2$"):
        plan_engine(EngineConfig(model="tiny", device="cpu", tensor_parallel_size=5))


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_reads_its_own_part_alone(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """Numbers read from the files: a share of all matrices, and the norms."""
    folder = ASSETS / "tiny"
    spec = loader.read_spec(loader.read_config(folder))
    read: list[int] = []
    original = loader._read

    def counting(*args: object) -> torch.Tensor:
        tensor = original(*args)  # type: ignore[arg-type]
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(loader, "_read", counting)
    options = {"dtype": torch.float32, "device": CPU, "max_len": 8}
    whole = load_decoder(folder, Partition(spec), **options)
    everything = sum(read)
    assert everything == spec.parameters()
    for group in thread_groups(2):
        read.clear()
        part = Partition(spec, group, exact)
        mine = load_decoder(folder, part, **options)
        assert everything / 2 <= sum(read) <= everything / 2 + 20 * spec.hidden_size
        same_parts(mine, whole)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("spec", "divided"),
    [
        (SPEC, False),
        (LLADA2, False),
        (replace(LLADA2, experts=replace(EXPERTS, shared_size=0)), True),
    ],
)
def test_random_weights_do_not_depend_on_the_ranks(
    spec: ModelSpec, divided: bool, exact: bool
) -> None:
    spec = replace(spec, qkv_bias=True)
    options = {"dtype": torch.float32, "device": CPU, "max_len": 8}
    group = ThreadGroup(1, 3, [], None)  # type: ignore[arg-type]
    mine = random_decoder(Partition(spec, group, exact, divided), **options)
    same_parts(mine, random_decoder(Partition(spec), **options))


def same_parts(mine: Decoder, whole: Decoder) -> None:
    """A rank's decoder holds its parts of the whole one's tensors."""
    all_of: dict[str, torch.Tensor] = {}
    for part, rows in places(whole):
        tensor = all_of.setdefault(part.name, torch.empty(part.shape, dtype=rows.dtype))
        tensor[part.cut] = rows
    for part, rows in places(mine):
        assert torch.equal(rows, all_of[part.name][part.cut]), part.name


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    for path in (ASSETS / "tiny").iterdir():
        data = path.read_bytes()
        short = path.suffix == ".safetensors"
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if short else data)
    from dllmserve import LLM
    from dllmserve.errors import WeightsError

    with pytest.raises(WeightsError, match=r"cannot be read"):
        LLM(str(tmp_path), device="cpu", tensor_parallel_size=2)
