"""LLM.decide and AsyncLLM.decide, against a plain forward of a naive model."""

import asyncio
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, AsyncLLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.decisions.inputs import read_input
from dllmserve.decisions.questions import read_questions
from dllmserve.decisions.reading import How, decide
from dllmserve.decisions.template import Template
from dllmserve.errors import (
    ContextLengthError,
    DecisionError,
    InvalidParameterError,
    TokenizerError,
)
from dllmserve.models.loader import ASSETS
from tests.checkpoints import Shape, write_byte_model, write_random
from tests.conftest import Engines
from tests.helpers import check_idle
from tests.oracles.decisions import read
from tests.oracles.models import load

TEXT = "Since this morning every page of your site answers with error 502."
TEAM = {
    "type": "choice",
    "name": "team",
    "instructions": "Which team should handle this?",
    "choices": [
        {"value": "billing", "description": "Invoices, refunds"},
        {"value": "outage"},
        {"value": True},
    ],
}
ASKED: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "The writer is angry."},
    TEAM,
    {
        "type": "score",
        "instructions": "How urgent is it?",
        "levels": [{"label": f"level {i}"} for i in range(5)],
    },
    {
        "type": "choice",
        "instructions": "Which number?",
        "choices": [{"value": str(i)} for i in range(40)],
    },
]
FULL = ("llada", "dream")
NARROW = ("qwen3", "sdar", "fast-dllm")
#: of probabilities, between two ways to compute the same in float32
CLOSE = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints over bytes, with room for long prompts, by family."""
    root = tmp_path_factory.mktemp("decide")
    return {name: write_byte_model(root / name, name, 4096) for name in (*FULL, *NARROW)}


def chances(reply: dict[str, Any]) -> list[list[float]]:
    """Probabilities of each question's options."""
    return [
        [p["probability"] for p in made["probabilities"]]
        if "probabilities" in made
        else [made["probability"], 1 - made["probability"]]
        for made in reply["answers"]
    ]


def check(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert list(own) == pytest.approx(list(other), abs=CLOSE)


def by_hand(folder: Path, llm: LLM, asked: list[dict[str, Any]], how: How) -> list[list[float]]:
    """The same, canvas by canvas, by a naive model."""
    model, tokenizer, spec = load(folder), llm.tokenizer, llm.spec
    assert tokenizer is not None
    end = (*spec.turn_end_ids, *spec.eos_ids)[0]
    template = Template(tokenizer, end, 4096)
    steps = decide(template, TEXT, read_questions(asked), how, together=True)
    found: Any = None
    while True:
        try:
            readings = steps.send(found)
        except StopIteration as stop:
            result: list[list[float]] = stop.value
            return result
        found = [read(model, r.ids, r.holes, r.asked) for r in readings]


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("how", [How(), How("sequential"), How(orders=3)], ids=str)
def test_probabilities_are_those_of_a_plain_forward(
    engines: Engines, folders: dict[str, Path], name: str, how: How
) -> None:
    llm = engines(folders[name])
    reply = llm.decide(TEXT, ASKED, "it", reading=how.reading, orders=how.orders)
    check(chances(reply), by_hand(folders[name], llm, ASKED, how))
    assert reply["model"] == "it"
    assert [made["type"] for made in reply["answers"]] == [q["type"] for q in ASKED]
    assert [made["name"] for made in reply["answers"]] == [None, "team", None, None]
    check_idle(llm)


def test_the_embedded_model(engines: Engines) -> None:
    llm = engines(Path("tiny"))
    reply = llm.decide(TEXT, ASKED)
    check(chances(reply), by_hand(ASSETS / "tiny", llm, ASKED, How()))
    assert reply["model"] == "tiny"
    assert llm.decide(TEXT, ASKED) == reply  # the same to the bit


def test_no_option_of_the_engine_cuts_the_canvas(folders: dict[str, Path]) -> None:
    llm = LLM(str(folders["llada"]), device="cpu", default_block_length=32)
    plans: list[StepPlan] = []
    with llm.observe(plans.append):
        reply = llm.decide(TEXT, ASKED[:3])
    assert len(plans) == 1
    check(chances(reply), by_hand(folders["llada"], llm, ASKED[:3], How()))


def alone(llm: LLM, ids: list[int], asked: Sequence[int]) -> list[float]:
    """Log-probabilities of the next token, as generate() tells them of the one that it writes."""
    length = {"max_tokens" if llm.spec.geometry == "causal" else "gen_length": 1}
    base: dict[str, Any] = {"temperature": 0.0, "steps_per_block": 1, "logprobs": 0, **length}
    forced = [SamplingParams(**base, ignore_eos=True, logit_bias={id: 100.0}) for id in asked]
    outputs = llm.generate([ids] * len(asked), forced, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [[id] for id in asked]
    return [output["logprobs"][0]["logprob"] for output in outputs]


@pytest.mark.parametrize("name", NARROW)
def test_other_geometries_read_the_end_of_a_prompt(
    engines: Engines, folders: dict[str, Path], name: str
) -> None:
    """Each question by itself: what would be generated behind the prompt and its number."""
    llm = engines(folders[name])
    reply = llm.decide(TEXT, ASKED)
    template = llm._decider._template
    (page,) = template.pages(read_input(TEXT), read_questions(ASKED), [0] * 4, 1)
    for number, own in enumerate(chances(reply)[:3]):
        reading = page.alone(number, {})
        logs = alone(llm, reading.ids[:-1], [c[0] for c in page.lines[number].codes])
        weights = [math.exp(log - max(logs)) for log in logs]
        assert own == pytest.approx([w / sum(weights) for w in weights], abs=CLOSE)
    # the prompt is the same for all of them, and is stored once
    usage = reply["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] > usage["input_tokens"] / 2
    sequential = llm.decide(TEXT, ASKED, reading="sequential")
    check(chances(sequential)[:1], chances(reply)[:1])
    assert chances(sequential)[1] != pytest.approx(chances(reply)[1], abs=1e-3)
    check_idle(llm)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the embedded one's tokenizer, and room for 400 questions."""
    folder = tmp_path_factory.mktemp("wordy") / "model"
    shape = Shape(family="llada", heads=1, kv_heads=1, layers=1, vocab=4096, mask_id=2)
    write_random(folder, Shape(**{**vars(shape), "eos_ids": (3,), "max_len": 16384}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, folder)
    return folder


@pytest.mark.parametrize("count", [1, 100, 400])
def test_many_questions_are_one_forward(engines: Engines, wordy: Path, count: int) -> None:
    llm = engines(wordy, max_num_batched_tokens=16384)
    asked = [{**ASKED[0], "instructions": f"{i}?"} for i in range(count - 1)] + [TEAM]
    plans: list[StepPlan] = []
    with llm.observe(plans.append):
        reply = llm.decide(TEXT, asked)
    assert len(plans) == 1 and len(plans[0].entries) == 1
    assert reply["usage"]["output_tokens"] == count == len(reply["answers"])
    if count == 100:
        check(chances(reply), by_hand(wordy, llm, asked, How()))
    check_idle(llm)


@pytest.mark.parametrize("name", ["dream", "qwen3", "sdar"])
def test_company_changes_nothing(engines: Engines, folders: dict[str, Path], name: str) -> None:
    """Others of every kind in the same steps: decisions, and answers that are generated."""
    llm = engines(folders[name], max_num_seqs=16)
    lists = [ASKED[:2], [TEAM], ASKED[1:3], ASKED]
    before = [chances(llm.decide(TEXT, asked)) for asked in lists]
    length = {"max_tokens" if name == "qwen3" else "gen_length": 24}
    params = SamplingParams(temperature=0.7, seed=3, **length)
    prompts = ["Hello", "The people", "Umbrella"]
    answers = llm.generate(prompts, params, use_tqdm=False)

    def again(number: int) -> Any:
        if number % 2:
            return llm.generate(prompts, params, use_tqdm=False)
        return chances(llm.decide(TEXT, lists[number // 2]))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(again, range(8)))
    for number, own in enumerate(found):
        if number % 2:
            assert [a["token_ids"] for a in own] == [a["token_ids"] for a in answers]
        else:
            check(own, before[number // 2])
    check_idle(llm)


def test_async_llm_decides_the_same(engines: Engines, folders: dict[str, Path]) -> None:
    expected = engines(folders["dream"]).decide(TEXT, ASKED, orders=2)

    async def main() -> None:
        async with AsyncLLM(str(folders["dream"]), device="cpu") as llm:
            first, second, text = await asyncio.gather(
                llm.decide(TEXT, ASKED, orders=2),
                llm.decide(TEXT, ASKED, orders=2),
                llm.generate("Hello", SamplingParams(gen_length=8, steps=8)),
            )
            assert len(text["token_ids"]) <= 8
            for reply in (first, second):
                check(chances(reply), chances(expected))
                assert reply["usage"] == expected["usage"] and reply["model"] == llm.config.model
            with pytest.raises(DecisionError, match="questions: expected 1 to 400"):
                await llm.decide(TEXT, [])

    asyncio.run(main())


WRONG: list[tuple[Callable[[LLM], Any], type[Exception], str]] = [
    (lambda llm: llm.decide(TEXT, []), DecisionError, "questions: expected 1 to 400 items, got 0"),
    (lambda llm: llm.decide([], ASKED), DecisionError, "input: expected at least 1 item"),
    (
        lambda llm: llm.decide(TEXT, ASKED, reading="both"),
        InvalidParameterError,
        "reading must be one of 'parallel', 'sequential', got 'both'",
    ),
    (lambda llm: llm.decide(TEXT, ASKED, orders=0), InvalidParameterError, "orders must be"),
    (
        lambda llm: llm.decide("a" * 4000, ASKED),
        ContextLengthError,
        r"the input and questions\[0\] take \d+ tokens, over the 4096",
    ),
    (
        lambda llm: llm.decide("a" * 70_000, ASKED),
        ContextLengthError,
        "have 70025 characters, over the 65536",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), WRONG)
def test_what_is_wrong_is_refused_before_a_forward(
    engines: Engines,
    folders: dict[str, Path],
    call: Callable[[LLM], Any],
    kind: type[Exception],
    words: str,
) -> None:
    llm = engines(folders["llada"])
    plans: list[StepPlan] = []
    with llm.observe(plans.append), pytest.raises(kind, match=words):
        call(llm)
    assert not plans


def test_without_a_tokenizer_there_are_no_labels(
    engines: Engines, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(TokenizerError, match="decisions need a tokenizer"):
        engines(checkpoints["llada"]).decide(TEXT, ASKED)
