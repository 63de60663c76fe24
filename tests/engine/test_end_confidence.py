"""LLaDA's logits_eos_inf and confidence_eos_eot_inf, against the script's loop and definitions."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve.errors import InvalidParameterError
from dllmserve.runtime import logits
from tests.checkpoints import Shape, write_random
from tests.conftest import Engines
from tests.helpers import answer, check_idle, need_interpreter, random_prompt, with_turn_ends
from tests.oracles import llada, models, policies
from tests.oracles.ends import Ends
from tests.parallel.threads import threaded_llm
from tests.reference import decode, uniforms

Options = dict[str, Any]
Job = tuple[list[int], SamplingParams, SparseConfig | None]

#: many ids end an answer, so that random models propose them often
TEXT, TURN = tuple(range(10, 25)), tuple(range(40, 52))
VOCAB, MASK = 61, 60
FLAGS = [
    {"logits_eos_inf": a, "confidence_eos_eot_inf": b}
    for a, b in ((True, False), (False, True), (True, True))
]


def shape(family: str) -> Shape:
    return Shape(family=family, eos_ids=TEXT + TURN, seed=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("ends")
    return {name: write_random(base / name, shape(name)) for name in ("llada", "dream")}


@cache
def oracle(folder: Path) -> models.OracleModel:
    return models.load(folder)


def engine(engines: Engines, folder: Path, **options: Any) -> LLM:
    return with_turn_ends(engines(folder, **options), TURN)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_llada_generate(
    engines: Engines, folders: dict[str, Path], flags: Options, temperature: float, cfg_scale: float
) -> None:
    """Upstream's loop, with the engine's noise; and it matters."""
    llm, ends = engine(engines, folders["llada"]), Ends(TEXT, TURN, **flags)
    shared = {"steps": 12, "gen_length": 24, "block_length": 12}
    shared |= {"temperature": temperature, "cfg_scale": cfg_scale}
    changed = 0
    for seed in range(3):
        prompt = random_prompt(seed, 9 + seed)

        def tokens(_row: int, position: int, step: int, seed: int = seed) -> Tensor:
            u = uniforms(seed, position, step, VOCAB)
            u[MASK] = 0.0  # never drawn
            return u

        found = [
            llada.generate(
                oracle(folders["llada"]), torch.tensor([prompt]), uniform=tokens, ends=e, **shared
            )[0].tolist()
            for e in (ends, Ends())
        ]
        params = SamplingParams(ignore_eos=True, seed=seed, **shared, **flags)
        assert answer(llm, prompt, params) == found[0]
        changed += found[0] != found[1]
    assert changed


#: every kind of confidence, filter, sampler, cache and guidance
WAYS: dict[str, Options] = {
    "steps": {"steps": 7, "block_length": 5},
    "threshold": {"unmask": "threshold", "threshold": 0.3, "cache": "dual", "block_length": 6},
    "zero": {"unmask": "threshold", "threshold": 0.0, "block_length": 3},
    "factor": {"unmask": "factor", "factor": 2.0, "confidence": "margin", "block_length": 6},
    "margin": {"steps": 6, "confidence": "margin", "temperature": 0.7, "seed": 1},
    "entropy-bound": {"unmask": "entropy_bound", "entropy_bound": 3.0},
    "neg-entropy": {"steps": 6, "confidence": "neg_entropy", "cache": "prefix"},
    "entropies": {"unmask": "threshold", "confidence": "neg_entropy", "threshold": -1.0},
    "guided": {"steps": 6, "cfg_scale": 0.7, "block_length": 7, "cache": "dual"},
    "sampled": {"steps": 6, "temperature": 0.8, "seed": 3, "cache": "dual"},
    "top-p": {"steps": 6, "temperature": 0.9, "top_p": 0.7, "seed": 4},
    "top-k": {"steps": 6, "temperature": 1.1, "top_k": 6, "seed": 5, "cfg_scale": 0.4},
    "biased": {"steps": 6, "logit_bias": {12: 100.0, 45: 60.0, 7: 3.0}, "block_length": 7},
    "banned": {"steps": 6, "logit_bias": dict.fromkeys(range(0, 60, 3), -100.0)},
    "dream": {"steps": 6, "schedule": "dream", "temperature": 0.7, "seed": 7},
    "dream-top": {"steps": 6, "schedule": "dream", "temperature": 0.7, "top_p": 0.6, "seed": 8},
    "dream-one": {"steps": 6, "schedule": "dream", "temperature": 0.7, "top_k": 1, "seed": 9},
    "sparse": {"steps": 6, "block_length": 4},
    "ending": {"steps": 6, "block_length": 4, "ignore_eos": False},
}
#: a few of them, where the interpreter is slow
SOME = ("steps", "margin", "neg-entropy", "sampled", "biased", "dream")


@cache
def jobs(
    gen_length: int = 14, flags: int | None = None, ways: tuple[str, ...] = tuple(WAYS)
) -> tuple[Job, ...]:
    """One job of each way with each pair of flags, or with one of them."""
    made: list[Job] = []
    for number, (way, options) in enumerate(WAYS.items()):
        if way not in ways:
            continue
        for one in FLAGS if flags is None else [FLAGS[flags]]:
            given = {"temperature": 0.0, "gen_length": gen_length, "ignore_eos": True, **options}
            sparse = SparseConfig(default_block_len=4) if way == "sparse" else None
            prompt = random_prompt(number, 3 + 5 * number % 17)
            made.append((prompt, SamplingParams(**given, **one), sparse))
    return tuple(made)


def run(llm: LLM, batch: tuple[Job, ...] | list[Job]) -> list[list[int]]:
    prompts, params, sparse = (list(column) for column in zip(*batch, strict=True))
    outputs = llm.generate(prompts, params, sparse, use_tqdm=False)
    check_idle(llm)
    return [output["token_ids"] for output in outputs]


def without(batch: tuple[Job, ...]) -> list[Job]:
    off = {"logits_eos_inf": False, "confidence_eos_eot_inf": False}
    return [(prompt, replace(params, **off), sparse) for prompt, params, sparse in batch]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_engine_equals_the_slow_decoder(
    engines: Engines, folders: dict[str, Path], name: str
) -> None:
    """Alone, together, among requests without the flags, and in small chunks."""
    llm = engine(engines, folders[name])
    batch = jobs()
    expected = [
        decode(oracle(folders[name]), *job, eos_ids=TEXT + TURN, turn_ids=TURN).ids for job in batch
    ]
    assert [run(llm, [job])[0] for job in batch] == expected
    assert run(llm, batch) == expected
    plain = run(llm, without(batch))
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) >= len(batch) // 2
    mixed = [job for pair in zip(without(batch), batch, strict=True) for job in pair]
    both = [ids for pair in zip(plain, expected, strict=True) for ids in pair]
    assert run(llm, mixed) == both
    small = engine(engines, folders[name], max_logit_rows=3, max_num_batched_tokens=90)
    assert run(small, mixed) == both
    for (_, params, _), ids in zip(batch, expected, strict=True):
        assert not params.logits_eos_inf or not set(TEXT) & set(ids)


#: rules that keep something between forwards, and the refreshes that go with them
RULES: list[Options] = [
    {"unmask": "threshold_strict", "threshold": 0.3, "cache": "rolling"},
    {"unmask": "factor_strict", "factor": 2.0, "cache": "delayed"},
    {"unmask": "hierarchy", "threshold": 0.5, "low_threshold": 0.1, "cache": "dual"},
    {"unmask": "credit", "threshold": 0.5, "cache": "drift"},
    {"unmask": "klass", "threshold": 0.3, "kl_threshold": 1.0, "kl_history": 1},
    {"unmask": "wino", "threshold": 0.3, "threshold_back": 0.3, "cache": "dual"},
    {"unmask": "wino", "threshold": 0.1, "threshold_back": 0.6},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_rules_equal_their_slow_twins(
    engines: Engines, folders: dict[str, Path], name: str, flags: Options
) -> None:
    llm = engine(engines, folders[name])
    lengths = {"gen_length": 21, "block_length": 8}
    batch: list[Job] = []
    expected = []
    for number, options in enumerate(RULES):
        prompt = random_prompt(number, 4 + 3 * number)
        given = {"cache": "none", **lengths, **options}
        [result] = policies.generate(
            oracle(folders[name]), [prompt], ends=Ends(TEXT, TURN, **flags), **given
        )
        expected.append(result.tokens)
        params = SamplingParams(temperature=0.0, ignore_eos=True, **given, **flags)
        batch.append((prompt, params, None))
    assert [run(llm, [job])[0] for job in batch] == expected
    assert run(llm, batch) == expected


@pytest.mark.parametrize(("name", "flags"), [("llada", 2), ("dream", 1)])
def test_on_triton_kernels(
    engines: Engines, folders: dict[str, Path], name: str, flags: int
) -> None:
    """The fused reducer and the step's twin, under the interpreter."""
    need_interpreter()
    llm = engine(engines, folders[name], kernels="triton", max_model_len=64)
    batch = jobs(4, flags, SOME)
    assert run(llm, batch) == run(engine(engines, folders[name]), batch)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_on_two_ranks(
    engines: Engines, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    two, _, _ = threaded_llm(monkeypatch, str(folders[name]), 2)
    batch = jobs(8, flags=2) + jobs(8, flags=1)
    assert run(with_turn_ends(two, TURN), batch) == run(engine(engines, folders[name]), batch)


#: id 2 is likeliest and ends the text, 1 comes next and ends the turn; 4 is the mask
LOGITS = [0.0, 2.0, 3.0, 1.0, 9.0]


def confidence(llm: LLM, **options: Any) -> tuple[set[int | None], float]:
    """Proposals of the first forward, and their one confidence."""
    params = SamplingParams(gen_length=4, steps=4, ignore_eos=True, **options)
    first = next(iter(llm.stream([3, 3], params)))
    found = {c for c in first.confidence if c is not None}
    assert len(found) == 1
    return set(first.token_ids), found.pop()


def softmax(*logits: float) -> list[float]:
    return torch.tensor(logits).double().softmax(dim=-1).tolist()


def test_confidences_are_those_of_the_definition(
    engines: Engines, constant_checkpoint: Callable[[list[float]], Path]
) -> None:
    folder = constant_checkpoint(LOGITS)
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | {"eos_token_id": [2, 1]}))
    llm = with_turn_ends(engines(folder, max_model_len=64), (1,))
    assert llm.spec.eos_ids == (2, 1)
    both = {"logits_eos_inf": True, "confidence_eos_eot_inf": True}
    assert confidence(llm, temperature=0.0) == ({2}, pytest.approx(softmax(*LOGITS)[2]))
    # the end of the text is proposed, with no confidence
    assert confidence(llm, temperature=0.0, confidence_eos_eot_inf=True) == ({2}, 0.0)
    for kind, value in (("margin", 0.0), ("neg_entropy", -1e9)):
        found = confidence(llm, temperature=0.0, confidence=kind, confidence_eos_eot_inf=True)
        assert found == ({2}, value)
    # the end of the turn is proposed instead
    assert confidence(llm, temperature=0.0, logits_eos_inf=True) == (
        {1},
        pytest.approx(softmax(0.0, 2.0, 1.0, 9.0)[1]),
    )
    assert confidence(llm, temperature=0.0, **both) == ({1}, 0.0)
    # others have what the rest of the distribution gives them
    ban = {1: -100.0}
    assert confidence(llm, temperature=0.0, logit_bias=ban, **both) == (
        {3},
        pytest.approx(softmax(0.0, 1.0, 9.0)[1]),
    )
    # with a temperature, the end of the text keeps its confidence: upstream's quirk
    cold = {"temperature": 0.01, "seed": 1, "confidence_eos_eot_inf": True}
    assert confidence(llm, **cold) == ({2}, pytest.approx(softmax(0.0, 3.0, 1.0, 9.0)[1]))
    assert confidence(llm, logits_eos_inf=True, **cold) == ({1}, 0.0)
    # no bias brings an id back
    assert confidence(llm, temperature=0.0, logit_bias={2: 100.0}, logits_eos_inf=True)[0] == {1}


def test_ends_are_written_last(engines: Engines, folders: dict[str, Path]) -> None:
    """One token a step: what is written after a proposed end is an end itself."""
    llm = engine(engines, folders["llada"])
    params = SamplingParams(
        temperature=0.0, gen_length=12, steps=12, ignore_eos=True, confidence_eos_eot_inf=True
    )
    for seed in range(3):
        for step in llm.stream(random_prompt(seed, 8), params):
            pairs = zip(step.token_ids, step.confidence, strict=True)
            assert all((c == 0.0) == (t in TEXT + TURN) for t, c in pairs if c is not None)


def test_a_full_bias_leaves_room_for_the_ends(engines: Engines, tmp_path: Path) -> None:
    ids = (1, 2, 3)
    folder = write_random(tmp_path, Shape(family="llada", vocab=1029, mask_id=1028, eos_ids=ids))
    llm = with_turn_ends(engines(folder), (3,), ids)
    bias = dict.fromkeys(range(4, 1028), -100.0)
    assert len(bias) == 1024
    params = SamplingParams(
        temperature=0.0, gen_length=6, steps=3, logit_bias=bias, logits_eos_inf=True, seed=1
    )
    assert set(answer(llm, [5, 6], params)) <= {0, 3}
    # and the next request in the row knows nothing of it
    plain = SamplingParams(temperature=0.0, gen_length=6, steps=3, ignore_eos=True)
    assert answer(llm, [5, 6], plain) == decode(models.load(folder), [5, 6], plain).ids


@pytest.mark.parametrize(
    ("text", "turn", "options", "parts"),
    [
        ((), (7,), {"logits_eos_inf": True}, ["logits_eos_inf=True", "ends the text"]),
        ((), (), {"confidence_eos_eot_inf": True}, ["ends a text or a turn", "has none"]),
        (
            (7,),
            (),
            {"confidence_eos_eot_inf": True, "temperature": 0.5},
            ["ends a turn at temperature=0.5", "has none"],
        ),
    ],
)
def test_a_model_without_such_ids_refuses(
    engines: Engines,
    checkpoints: dict[str, Path],
    text: tuple[int, ...],
    turn: tuple[int, ...],
    options: Options,
    parts: list[str],
) -> None:
    llm = engines(checkpoints["llada"])
    was = llm.spec.eos_ids
    try:
        with_turn_ends(llm, turn, text + turn)
        with pytest.raises(InvalidParameterError) as caught:
            answer(llm, [1, 2], SamplingParams(**{"temperature": 0.0, **options}))
        assert all(part in str(caught.value) for part in parts)
    finally:
        with_turn_ends(llm, (), was)


def test_random_ranks_read_no_confidence() -> None:
    with pytest.raises(InvalidParameterError, match="remasking='random' does not read"):
        SamplingParams(remasking="random", confidence_eos_eot_inf=True)
    SamplingParams(remasking="random", logits_eos_inf=True)


def test_no_work_for_requests_without_it(
    engines: Engines, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(engines, folders["llada"])
    seen: list[bool] = []
    reduce = logits.TorchReducer.reduce

    def spy(self: Any, z: Tensor, params: Any, *rest: Any) -> Any:
        seen.append(params.last is not None)
        return reduce(self, z, params, *rest)

    monkeypatch.setattr(logits.TorchReducer, "reduce", spy)
    batch = jobs(flags=1)[:3]
    run(llm, without(batch))
    assert seen and not any(seen)
    seen.clear()
    run(llm, [*without(batch), *batch])
    assert any(seen) and not all(seen)
