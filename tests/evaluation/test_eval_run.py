"""Runs: the embedded model's answers, the figures that follow, and errors before anything runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve import LLM
from dllmserve.errors import (
    ConfigError,
    ContextLengthError,
    DllmServeError,
    InvalidParameterError,
    TokenizerError,
)
from dllmserve.tools.evaluation import Item, Setting, evaluate, held_out, select
from dllmserve.tools.evaluation.figures import Figures, Measured, Outcome, SettingResult, summarise
from dllmserve.tools.evaluation.run import Evaluation, find_baseline
from dllmserve.tools.evaluation.settings import suite
from tests.checkpoints import write_byte_model
from tests.conftest import Engines

FAST = Setting("fast", {"unmask": "threshold", "threshold": 0.9})
#: every token of a block at once, which costs word problems something
BLOCK = Setting("block", tokens_per_step=32)


@pytest.fixture(scope="module")
def tiny(engines: Engines) -> LLM:
    return engines(Path("tiny"), max_model_len=512)


def item(number: int, task: str = "t", answer: str = "yes") -> Item:
    return Item(str(number), task, ({"role": "user", "content": "?"},), (answer,), "exact")


def outcomes(texts: Sequence[str], forwards: int, task: str = "t") -> list[Outcome]:
    """Answers that are right where the text is "yes"."""
    return [
        Outcome(
            item=item(number, task),
            text=text,
            right=item(number).is_right(text),
            finish_reason="length" if text == "cut" else "stop",
            usage={"prompt_tokens": 3, "completion_tokens": 8, "forward_passes": forwards},
        )
        for number, text in enumerate(texts)
    ]


def test_a_real_run(tiny: LLM) -> None:
    items = select(held_out(), ["word", "json"], 4)
    said: list[str] = []
    base, block = evaluate(tiny, items, [FAST, BLOCK], progress=said.append)
    assert said == ["fast (1 of 2)", "block (2 of 2)"]
    assert (base.name, base.overall.items, base.overall.right) == ("fast", 8, 8)
    assert base.right == "1" * 8 and base.overall.difference is None
    assert set(base.tasks) == {"word", "json"} and base.tasks["word"].items == 4
    # two blocks of 32, or the first one alone where the answer ends in it
    assert 1 <= block.overall.forwards <= 2 <= base.overall.tokens_per_forward
    assert block.overall.forwards_ratio == pytest.approx(
        block.overall.forwards / base.overall.forwards
    )
    assert block.overall.difference is not None and block.overall.difference.gained == 0
    assert block.sampling["steps"] == 2 and block.varies == {}
    assert (base.rule, base.cache, base.sparse) == ("threshold", "none", None)
    assert base.seconds > 0 and base.tokens_per_second > 0


def test_a_suite_on_a_block_causal_model(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What the model has no use for is left out, and the pace is one of blocks."""
    llm = engines(write_byte_model(tmp_path_factory.mktemp("sdar"), "sdar"), max_model_len=256)
    evaluation = Evaluation(llm, [item(1)])
    settings = suite("frontier", Setting("base", {"gen_length": 16, "ignore_eos": True}))
    names = [setting.name for setting in settings]
    kept, why = evaluation.fitting(settings, set(names[1:]))
    left = ["8 tokens a step", "16 tokens a step", "32 tokens a step", "wino 0.6", "wino 0.3"]
    assert [setting.name for setting in kept] == [name for name in names if name not in left]
    same, wino = why
    assert same == (
        "left out '8 tokens a step', '16 tokens a step', '32 tokens a step': the same as "
        "'4 tokens a step'"
    )
    assert wino.startswith("left out 'wino 0.6', 'wino 0.3': unmask='wino' reads K,V of ")
    evaluation.check(kept)
    one, two, four = (evaluation.run(setting) for setting in kept[:3])
    # a prompt that ends inside a block leaves less of it to fill
    for measured, least, most in ((one, 16, 19), (two, 8, 10), (four, 4, 5)):
        assert least <= measured.outcomes[0].usage["forward_passes"] <= most
    assert two.setting.params().steps_per_block == 2
    # what somebody asked for by name is refused
    with pytest.raises(InvalidParameterError, match=r"setting 'wino 0.6': unmask='wino'"):
        evaluation.check(settings)
    too_long = Setting("long", {"gen_length": 4096})
    with pytest.raises(ContextLengthError, match="setting 'long'"):
        evaluation.fitting([too_long], {"long"})


def test_answers_are_those_of_the_same_requests_alone(tiny: LLM) -> None:
    few = select(held_out(), ["listop", "edit"], 1)
    setting = Setting("sparse", {"unmask": "threshold"}, {"retention_ratio": 0.5})
    found = Evaluation(tiny, few).run(setting).outcomes
    for outcome, asked in zip(found, few, strict=True):
        (alone,) = tiny.chat([asked.messages], setting.params(asked.gen_length), use_tqdm=False)
        assert outcome.text == alone["text"] and outcome.usage == alone["usage"]


def test_raw_prompts(byte_checkpoint: Path, engines: Engines) -> None:
    llm = engines(byte_checkpoint)
    setting = Setting("a", {"gen_length": 4})
    chat = Evaluation(llm, [item(1)]).run(setting).outcomes[0]
    raw = Evaluation(llm, [item(1)], raw=True).run(setting).outcomes[0]
    assert raw.usage["prompt_tokens"] == 1 < chat.usage["prompt_tokens"]
    talk = replace(item(1), messages=item(1).messages * 2)
    with pytest.raises(ConfigError, match=r"item '1' is a conversation, .* drop --raw"):
        Evaluation(llm, [talk], raw=True)


def test_what_cannot_run_is_refused_before_anything_does(tiny: LLM) -> None:
    evaluation = Evaluation(tiny, select(held_out(), ["word"], 2))
    cases: list[tuple[list[Setting], type[DllmServeError], str]] = [
        ([FAST, FAST], ConfigError, "two settings are named 'fast'"),
        (
            [FAST, Setting("long", {"gen_length": 500})],
            DllmServeError,
            r"setting 'long': item 'word/.*over max_model_len=512",
        ),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            evaluation.check(settings)
    with pytest.raises(ConfigError, match="no items"):
        Evaluation(tiny, [])
    with pytest.raises(InvalidParameterError, match="setting 'both': a SparseConfig and cache="):
        Setting("both", {"cache": "dual"}, {})


def test_models_that_cannot_be_asked(checkpoints: dict[str, Path], engines: Engines) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer, so its answers cannot be judged"):
        Evaluation(engines(checkpoints["dream"]), [item(1)])


def test_find_baseline() -> None:
    assert find_baseline([FAST, BLOCK], None) == "fast"
    assert find_baseline([FAST, BLOCK], "block") == "block"
    with pytest.raises(ConfigError, match="baseline must be one of the settings 'fast', 'block'"):
        find_baseline([FAST, BLOCK], "blok")
    with pytest.raises(ConfigError, match="no settings"):
        find_baseline([], None)


def test_figures() -> None:
    base = outcomes(["yes", "yes", "no", "cut"], 8)
    other = outcomes(["yes", "no", "yes", "cut"], 2)
    figures = Figures.of(other, base)
    assert (figures.items, figures.right, figures.accuracy, figures.cut) == (4, 2, 0.5, 1)
    assert (figures.forwards, figures.forwards_ratio, figures.tokens_per_forward) == (2, 0.25, 4)
    assert figures.same_text == 0.5 and figures.usage["prompt_tokens"] == 3
    gap = figures.difference
    assert gap is not None and (gap.value, gap.gained, gap.lost) == (0.0, 1, 1)
    assert gap.low < 0 < gap.high
    assert Figures.of(base, None).difference is None


def test_summarise_and_the_record_of_it() -> None:
    two = [*outcomes(["yes", "no"], 4), *outcomes(["yes"], 4, "other")]
    measured = [Measured(FAST, two, 2.0), Measured(BLOCK, two, 0.5)]
    fast, block = summarise(measured, "block")
    assert block.overall.difference is None and fast.overall.difference is not None
    assert set(fast.tasks) == {"t", "other"} and fast.right == "101"
    assert fast.tokens_per_second == pytest.approx(12.0)
    for result in (fast, block):
        record: dict[str, Any] = json.loads(json.dumps(asdict(result)))
        assert msgspec.convert(record, SettingResult) == result


def test_counts_that_other_outputs_have_are_kept() -> None:
    """Usage may gain counts, such as computed tokens; their means are reported as they come."""
    more = [replace(o, usage={**o.usage, "computed_tokens": 90}) for o in outcomes(["yes"], 2)]
    assert Figures.of(more, None).usage["computed_tokens"] == 90


def test_what_varies_with_the_item() -> None:
    short, long = replace(item(1), gen_length=16), replace(item(2), gen_length=64)
    answers = [replace(o, item=i) for o, i in zip(outcomes("ab", 1), (short, long), strict=True)]
    result = SettingResult.of(Measured(Setting("a"), answers, 1.0), None)
    assert result.varies == {"gen_length": [16, 64], "steps": [16, 64]}
    assert result.sampling["gen_length"] == 16
