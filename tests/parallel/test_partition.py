"""Who holds what: parts of weights and vocabularies, and which numbers of ranks work."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.setup import plan_engine
from dllmserve.errors import ConfigError
from dllmserve.models import loader
from dllmserve.models.decoder import parameter_shapes, take, whole_shapes
from dllmserve.models.loader import ASSETS, load_decoder, random_decoder
from dllmserve.parallel.partition import Partition, sizes
from dllmserve.parallel.vocab import VocabShard, first_id, split_width, splits_of
from tests.helpers import PLAIN
from tests.parallel.threads import ThreadGroup, thread_groups

CPU = torch.device("cpu")
SPEC = replace(PLAIN, hidden_size=24, num_heads=6, num_kv_heads=6, mlp_size=36, embedding_size=400)


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


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_parts_make_the_whole(size: int, exact: bool) -> None:
    """Put together along the dimension that was cut, they are the parameter again."""
    parts = [Partition(SPEC, rank, size, exact) for rank in range(size)]
    for name, shape in whole_shapes(SPEC).items():
        whole = torch.randn(shape)
        taken = [take(part, name, whole) for part in parts]
        for part, tensor in zip(parts, taken, strict=True):
            assert tuple(tensor.shape) == parameter_shapes(part)[name]
        if name.endswith("norm"):
            assert all(torch.equal(tensor, whole) for tensor in taken)
        elif name.endswith(("qkv", "gate_up")):
            # each rank has some rows of each matrix that they are made of
            assert sorted(map(tuple, torch.cat(taken).tolist())) == sorted(
                map(tuple, whole.tolist())
            )
        else:
            cut = 1 if not exact and name.endswith(("out", "down")) else 0
            assert torch.equal(torch.cat(taken, dim=cut), whole)


def test_a_share_of_the_weights_is_a_share_of_the_memory() -> None:
    spec = loader.read_spec(loader.read_config(ASSETS / "llada-8b"))
    for size in (2, 4, 8):
        held = [Partition(spec, rank, size).local.parameters() for rank in range(size)]
        norms = (2 * spec.num_layers + 1) * spec.hidden_size
        assert sum(held) == spec.parameters() + (size - 1) * norms
        assert max(held) < 1.02 * spec.parameters() / size


def spec_of(name: str) -> ModelSpec:
    return loader.read_spec(loader.read_config(ASSETS / name))


def test_sizes_that_work() -> None:
    assert sizes(spec_of("llada-8b")) == [1, 2, 4, 8, 16]
    assert sizes(spec_of("dream-7b")) == [1, 2, 4]
    assert sizes(SPEC) == [1, 2, 3, 6]
    with pytest.raises(ConfigError) as error:
        Partition(SPEC, 0, 4)
    for part in ("tensor_parallel_size=4", "6 heads", "MLP size 36", "what works: 1, 2, 3, 6"):
        assert part in str(error.value)


def test_the_door_says_which_sizes_work() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=5 .* what works: 1, 2$"):
        plan_engine(EngineConfig(model="tiny", device="cpu", tensor_parallel_size=5))


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_reads_its_own_part_alone(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """Numbers read from the files: a share of all matrices, and the norms."""
    folder = ASSETS / "tiny"
    config = loader.read_config(folder)
    spec = loader.read_spec(config)
    read: list[int] = []
    original = loader._read

    def counting(*args: object) -> torch.Tensor:
        tensor = original(*args)  # type: ignore[arg-type]
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(loader, "_read", counting)
    whole = load_decoder(
        folder, config, Partition(spec), dtype=torch.float32, device=CPU, max_len=8
    )
    everything = sum(read)
    assert everything == spec.parameters()
    for group in thread_groups(2):
        read.clear()
        part = Partition(spec, group.rank, 2, exact)
        mine = load_decoder(
            folder, config, part, dtype=torch.float32, device=CPU, max_len=8, group=group
        )
        assert everything / 2 <= sum(read) <= everything / 2 + 20 * spec.hidden_size
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, take(part, name, whole.weight(name))), name


def test_random_weights_do_not_depend_on_the_ranks() -> None:
    given_ = {"dtype": torch.float32, "device": CPU, "max_len": 8}
    whole = random_decoder(Partition(SPEC), **given_)  # type: ignore[arg-type]
    group = ThreadGroup(1, 3, [], None)  # type: ignore[arg-type]
    part = Partition(SPEC, 1, 3)
    mine = random_decoder(part, **given_, group=group)  # type: ignore[arg-type]
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, take(part, name, whole.weight(name))), name


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    for path in (ASSETS / "tiny").iterdir():
        data = path.read_bytes()
        short = path.suffix == ".safetensors"
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if short else data)
    from dllmserve import LLM
    from dllmserve.errors import WeightsError

    with pytest.raises(WeightsError, match=r"cannot be read"):
        LLM(str(tmp_path), device="cpu", tensor_parallel_size=2)
