"""mask_id, eos_ids and default_block_length: what the engine's options say goes before files."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, AsyncLLM, SamplingParams, SparseConfig
from dllmserve.cli.app import run
from dllmserve.config import EngineConfig
from dllmserve.core.validator import settled
from dllmserve.engine.setup import plan_engine
from dllmserve.errors import ConfigError, UnsupportedModelError
from dllmserve.models.loader import read_config, read_spec
from dllmserve.presets import same_pace, steps_for
from tests.checkpoints import Shape, byte_tokenizer, write_random
from tests.conftest import SHAPES, Engines
from tests.helpers import GOLDEN, PLAIN, answer, random_prompt
from tests.oracles import models
from tests.parallel.threads import threaded_llm
from tests.reference import decode

BLOCK = replace(PLAIN, geometry="block", block_length=4)


def changed(folder: Path, original: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in its config.json; those that are None are gone."""
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def greedy(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "gen_length": 14, "ignore_eos": True, **given})


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_mask_id_that_config_json_lacks(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, cfg_scale: float
) -> None:
    mask = SHAPES[name].mask_id
    bare = changed(tmp_path / "bare", checkpoints[name], mask_token_id=None)
    with pytest.raises(UnsupportedModelError, match=r"'mask_token_id': give mask_id \(--mask-id\)"):
        LLM(str(bare), device="cpu")
    llm = LLM(str(bare), device="cpu", mask_id=mask)
    oracle, params = models.load(checkpoints[name]), greedy(block_length=5, cfg_scale=cfg_scale)
    assert llm.spec.mask_id == mask
    prompt = random_prompt(1, 6)
    assert answer(llm, prompt, params) == decode(oracle, prompt, params).ids


def test_a_mask_id_goes_before_that_of_config_json(
    engines: Engines, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """In the forward, in what is never proposed, and in the second row of a guided request."""
    other = changed(tmp_path / "other", checkpoints["llada"], mask_token_id=33)
    for params in (greedy(), greedy(cfg_scale=2.0), greedy(temperature=3.0, seed=1)):
        expected = answer(engines(other), [1, 2, 3], params)
        own = answer(engines(checkpoints["llada"]), [1, 2, 3], params)
        assert answer(engines(checkpoints["llada"], mask_id=33), [1, 2, 3], params) == expected
        assert 33 not in expected and own != expected


@pytest.mark.parametrize("name", ["sdar-kv2of4", "fdv2-kv2of4"])
def test_of_block_causal_models(engines: Engines, tmp_path: Path, name: str) -> None:
    """A block length and a mask that the file lacks, or has wrong, and what a request gives."""
    config = read_config(GOLDEN / name)
    wrong = changed(tmp_path / "wrong", GOLDEN / name, mask_token_id=None, block_size=0, bd_size=0)
    with pytest.raises(UnsupportedModelError, match="give default_block_length"):
        LLM(str(wrong), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"embeddings: give mask_id \(--mask-id\)"):
        LLM(str(wrong), device="cpu", default_block_length=8)
    llm = LLM(str(wrong), device="cpu", default_block_length=8, mask_id=config["mask_token_id"])
    assert llm.spec.block_length == 8
    own = engines(GOLDEN / name)
    for given in ({"quality": "exact"}, {}, {"block_length": 16}):
        params = greedy(gen_length=24, **given)
        expected = replace(params, block_length=given.get("block_length", 8))
        assert answer(llm, [5, 6, 7], params) == answer(own, [5, 6, 7], expected), given


def test_the_block_length_of_full_attention(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """The same tokens and forwards as if the request had said so."""
    own, llm = (engines(checkpoints["llada"], **o) for o in ({}, {"default_block_length": 5}))
    assert (own.spec.block_length, llm.spec.block_length) == (0, 5)
    for given in (
        {"steps": 14},
        {"quality": "exact"},
        {"quality": "balanced", "ignore_eos": False},
        {"unmask": "threshold", "threshold": 0.3},
        {"cache": "dual"},
    ):
        [asked] = own.generate([[1, 2]], greedy(**given, block_length=5), use_tqdm=False)
        [got] = llm.generate([[1, 2]], greedy(**given), use_tqdm=False)
        assert got == asked, given
        longer = greedy(**given, block_length=14)
        [asked], [got] = (x.generate([[1, 2]], longer, use_tqdm=False) for x in (own, llm))
        assert got == asked, given


def test_what_a_request_leaves_out() -> None:
    spec = replace(PLAIN, block_length=24)
    sparse = SparseConfig(default_block_len=6)
    assert settled(SamplingParams(), spec).block_length == 24
    assert settled(SamplingParams(block_length=7), spec).block_length == 7
    assert settled(SamplingParams(sparse=sparse), spec).resolved_block_length == 6
    assert settled(SamplingParams(quality="fast"), spec).block_length == 24
    assert settled(SamplingParams(quality="fast", block_length=32), spec).block_length == 32
    assert settled(SamplingParams(quality="fast"), PLAIN).block_length == 32
    assert settled(SamplingParams(), BLOCK).block_length == 4
    assert settled(replace(SamplingParams(quality="fast"), seed=1), BLOCK).block_length == 4
    # one token a step, whatever the block's length
    exact = SamplingParams(quality="exact", gen_length=40)
    assert (exact.steps, settled(exact, spec).steps) == (64, 48)
    assert settled(replace(exact, seed=1), spec).steps == 48
    assert settled(SamplingParams(quality="exact", gen_length=40, steps=9), spec).steps == 9


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("old", [8, 32, 64])
def test_the_pace_stays(tokens: int, old: int) -> None:
    for new in (32, 64):
        steps = steps_for(100, old, tokens)
        assert same_pace(steps, 100, old, new) == steps_for(100, new, min(tokens, old))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config.json ends answers with 250, its tokenizer and its template with 256."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    write_random(folder, Shape(family="llada", vocab=260, mask_id=259, eos_ids=(250,)))
    byte_tokenizer(folder, chat=True)
    return folder


@pytest.mark.parametrize(
    ("given", "ends", "turns"),
    [
        (None, (250, 256), (256,)),
        ([7, 9, 7], (7, 9), ()),
        ((7, 256), (7, 256), (256,)),
        (256, (256,), ()),
        ([], (), ()),
    ],
)
def test_end_ids_replace_all_others(
    talker: Path, given: Any, ends: tuple[int, ...], turns: tuple[int, ...]
) -> None:
    spec = plan_engine(EngineConfig(model=str(talker), device="cpu", eos_ids=given)).spec
    assert (spec.eos_ids, spec.turn_end_ids) == (ends, turns)


def test_answers_end_with_them_alone(engines: Engines, talker: Path) -> None:
    free = greedy(gen_length=40, block_length=8)
    ids = answer(engines(talker), [65, 66], free)
    last = ids[9]
    llm = engines(talker, eos_ids=(last,))
    [output] = llm.generate([[65, 66]], replace(free, ignore_eos=False), use_tqdm=False)
    assert output["token_ids"] == ids[: ids.index(last) + 1]
    assert output["finish_reason"] == "stop"
    assert answer(engines(talker, eos_ids=()), [65, 66], replace(free, ignore_eos=False)) == ids


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llada-kv4of4", {"mask_id": 10**6}, "mask_id=1000000 has no embedding: the model's ids"),
        ("llada-kv4of4", {"eos_ids": [3, 10**6]}, "eos_ids has 1000000, which has no embedding"),
        ("llada-kv4of4", {"mask_id": 5, "eos_ids": [5]}, "eos_ids has 5, the mask"),
        ("qwen3-kv2of4", {"mask_id": 5}, "mask_id=5 does not work with an autoregressive model"),
        ("qwen3-kv2of4", {"default_block_length": 1}, "writes one token after the other: leave"),
        ("tiny", {"prefix_isolation": True, "prefix_caching": False}, "with prefix_caching=False"),
        ("tiny", {"expert_parallel": True}, "tensor_parallel_size=1 is one: give"),
        (
            "tiny",
            {"expert_parallel": True, "tensor_parallel_size": 2},
            "experts, of which DreamModel has none: leave it out",
        ),
        (
            "llada-moe-variant",
            {"expert_parallel": True, "tensor_parallel_size": 4},
            "number of experts 6, MLP size 64, shared expert's size 24, .* what works: 1, 2$",
        ),
        ("tiny", {"layers": 1}, "it needs load_format='dummy'"),
        ("tiny", {"layers": 99, "load_format": "dummy"}, "layers=99 is over the . that the model"),
        ("tiny", {"mask_id": -1}, "mask_id must be an integer >= 0, got -1"),
        ("tiny", {"default_block_length": 0}, r"must be an integer in \[1, 8192\], got 0"),
        ("tiny", {"eos_ids": "5"}, "eos_ids must be a list of token ids, got '5'"),
        ("tiny", {"eos_ids": [True]}, "each of eos_ids must be an integer >= 0, got True"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    folder = name if name == "tiny" else str(GOLDEN / name)
    with pytest.raises(ConfigError, match=words):
        LLM(folder, device="cpu", **options)


def test_end_ids_of_an_autoregressive_model() -> None:
    spec = read_spec(read_config(GOLDEN / "qwen3-kv2of4"), EngineConfig(eos_ids=[4]))
    assert (spec.eos_ids, spec.mask_id, spec.block_length) == ((4,), -1, 1)


def test_ranks_have_them(
    engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"mask_id": 33, "eos_ids": (7,), "default_block_length": 5}
    llm, _, _ = threaded_llm(monkeypatch, str(checkpoints["llada"]), 2, **options)
    assert answer(llm, [1, 2], greedy()) == answer(
        engines(checkpoints["llada"], **options), [1, 2], greedy()
    )


def test_an_engine_in_another_process_has_them(checkpoints: dict[str, Path]) -> None:
    options: dict[str, Any] = {"mask_id": 33, "eos_ids": [7, 8], "default_block_length": 5}

    async def main() -> None:
        async with AsyncLLM(str(checkpoints["llada"]), device="cpu", **options) as llm:
            spec = llm.info.spec
            assert (spec.mask_id, spec.eos_ids, spec.block_length) == (33, (7, 8), 5)
            output = await llm.generate([1, 2], greedy())
            assert 33 not in output["token_ids"] and len(output["token_ids"]) == 14

    asyncio.run(main())


def test_info_shows_them(capfd: pytest.CaptureFixture[str], talker: Path) -> None:
    args = ["info", "-m", str(talker), "--json", "--mask-id", "5", "--eos-ids", "7,9"]
    assert run([*args, "--block-length", "8"]) == 0
    shown = json.loads(capfd.readouterr().out)["model"]
    assert (shown["mask_id"], shown["eos_ids"], shown["block_length"]) == (5, [7, 9], 8)
    assert run([*args, "--eos-ids", "x"]) == 2
    assert "'x' is no token id" in capfd.readouterr().err
