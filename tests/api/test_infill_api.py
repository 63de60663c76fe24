"""Templates as people write them: pieces, results, errors; the same from another process."""

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, processors

from dllmserve import AsyncLLM, Hole, SamplingParams
from dllmserve.engine.codec import Codec
from dllmserve.engine.filled import template_row
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import (
    ContextLengthError,
    InvalidParameterError,
    InvalidRequestError,
    PromptError,
    TokenizerError,
    UnknownOptionError,
)
from tests import helpers
from tests.conftest import Engines

GREEDY = SamplingParams(temperature=0.0)


def test_pieces(engines: Engines, byte_checkpoint: Path) -> None:
    """Texts, ids of any kind, and holes; the text of the whole and of each hole."""
    llm = engines(byte_checkpoint)
    (end, *_) = llm.spec.eos_ids
    params = SamplingParams(temperature=0.0, logit_bias={end: -100.0})
    pieces = ["Dear ", Hole(3, name="who"), np.array([44, 10]), Hole(2), torch.tensor([46]), "!"]
    (found,) = llm.infill([pieces], params, use_tqdm=False)
    who, what = (hole["token_ids"] for hole in found["holes"])
    assert llm.tokenizer is not None
    dear, mark = map(llm.tokenizer.encode, ("Dear ", "!"))
    assert found["token_ids"] == [*dear, *who, 44, 10, *what, 46, *mark]
    assert found["text"] == llm.tokenizer.decode(found["token_ids"])
    assert [hole["text"] for hole in found["holes"]] == [
        llm.tokenizer.decode(who),
        llm.tokenizer.decode(what),
    ]
    assert sorted(found) == ["finish_reason", "holes", "steps", "text", "token_ids", "usage"]
    assert sorted(found["holes"][0]) == ["name", "steps", "text", "token_ids"]


def test_only_a_text_at_the_start_gets_what_begins_a_prompt() -> None:
    fast = Fast(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "Hello": 4}, unk_token="a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer = Tokenizer(Codec(fast), {}, {})
    assert tokenizer.encode("a b") == [2, 0, 1, 3]

    def row(*pieces: Any) -> list[int]:
        return template_row(tokenizer, pieces, "template")[0]

    assert row("a b", Hole(1), "b", "a") == [2, 0, 1, 0, 1, 0]
    assert row("", Hole(1), "b") == [2, 0, 1]
    assert row(Hole(1), "b") == [0, 1]
    assert row([1], "b", Hole(1)) == [1, 1, 0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("text", r"templates\[0\] must be a list of pieces .* got str"),
        (7, r"templates\[0\] must be a list of pieces .* got int"),
        ([], r"templates\[0\] has no hole: put a dllmserve.Hole"),
        (["abc", [1, 2]], r"templates\[0\] has no hole"),
        ([5, Hole(2)], r"templates\[0\]\[0\] is 5: give token ids as a list, \[5\]"),
        ([None, Hole(2)], r"templates\[0\]\[0\] must be a text or a list of token ids"),
        (
            ["a", {"hole": 2}],
            r"templates\[0\]\[1\] must be a text or a list of token ids, got dict",
        ),
        (["\ud800", Hole(2)], "not valid Unicode"),
        ([[-1], Hole(2)], r"templates\[0\]\[0\] is -1, outside the vocabulary"),
        ([Hole(2), [1, 10**6]], r"templates\[0\]\[3\] is 1000000, outside the vocabulary"),
        ([Hole(2), [1.5]], r"templates\[0\]\[2\] must be an integer token id, got 1.5"),
    ],
)
def test_what_is_no_template(
    engines: Engines, byte_checkpoint: Path, template: Any, why: str
) -> None:
    with pytest.raises(PromptError, match=why):
        engines(byte_checkpoint).infill([template], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("holes", "given", "why"),
    [
        ([Hole(3)], {"gen_length": 4}, "gen_length=4 contradicts the holes, which have 3 pos"),
        ([Hole(3), Hole(2)], {"max_tokens": 4}, "max_tokens=4 contradicts the holes, which have 5"),
        ([Hole(3)], {"regex": "a"}, "regex of SamplingParams .* give it to the Hole"),
        ([Hole(3)], {"choice": ["a", "b"]}, "choice of SamplingParams .* give it to the Hole"),
        ([Hole(3)], {"json_schema": {}}, "json_schema of SamplingParams .* give it to the Hole"),
        ([Hole(3)], {"suffix_window": 4}, "suffix_window=4 leaves out what stands behind"),
        ([Hole(3)], {"stop": "a"}, "stop ends the text of a single hole that may end early"),
        ([Hole(1, fill="up_to")] * 2, {"stop": "a"}, "stop ends the text of a single hole"),
        ([Hole(3, fill="up_to")], {"ignore_eos": True}, "with ignore_eos=True there is none"),
        ([Hole(8000), Hole(193)], {}, "the holes have more than 8192 positions"),
    ],
)
def test_what_does_not_go_with_holes(
    engines: Engines, tmp_path: Path, holes: list[Hole], given: Any, why: str
) -> None:
    from tests.checkpoints import Shape, write_random

    llm = engines(write_random(tmp_path, Shape(family="llada", max_len=8300)), max_num_seqs=1)
    pieces = [[1, 2], *(piece for hole in holes for piece in (hole, [3]))]
    with pytest.raises(InvalidParameterError, match=why):
        llm.infill([pieces], SamplingParams(**given), use_tqdm=False)


def test_the_whole_row_has_to_fit(engines: Engines) -> None:
    llm = engines(helpers.GOLDEN / "llada-kv2of4")
    most = llm.plan.limits.max_model_len
    with pytest.raises(ContextLengthError, match=rf"templates\[1\] has {most + 1} positions, its"):
        llm.infill([[Hole(1)], [[1] * (most - 4), Hole(5)]], GREEDY, use_tqdm=False)
    with pytest.raises(TokenizerError, match=r"templates\[0\]\[0\] is a text"):
        llm.infill([["a", Hole(2)]], GREEDY, use_tqdm=False)
    with pytest.raises(PromptError, match="templates must be a list of templates"):
        llm.infill("a", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="has 2 entries for 1 templates"):
        llm.infill([[Hole(2)]], [GREEDY] * 2, use_tqdm=False)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"length": 0}, r"length of a Hole must be an integer in \[1, 8192\], got 0"),
        ({"length": 8193}, r"length of a Hole must be an integer in \[1, 8192\]"),
        ({"length": 2.0}, "length of a Hole must be an integer"),
        ({"length": True}, "length of a Hole must be an integer"),
        ({"length": 1, "fill": "all"}, "fill of a Hole must be one of 'exact', 'up_to'"),
        ({"length": 1, "name": 5}, "name of a Hole must be a text, got 5"),
        ({"length": 1, "regex": 5}, "regex of a Hole must be a text, got 5"),
        ({"length": 1, "choice": []}, "choice must be a list of texts"),
        ({"length": 1, "json_schema": "{"}, "json_schema is no JSON"),
        ({"length": 1, "regex": "a", "choice": ["b"]}, "regex and choice of a Hole exclude"),
    ],
)
def test_what_is_no_hole(given: Any, why: str) -> None:
    with pytest.raises(InvalidParameterError, match=why):
        Hole(**given)


def test_unknown_fields_of_a_hole() -> None:
    with pytest.raises(UnknownOptionError, match="did you mean 'length'"):
        Hole(lenght=3)  # type: ignore[call-arg]


def test_from_another_process(engines: Engines, byte_checkpoint: Path) -> None:
    """The same results, errors at the door, many at once, and a request that runs again."""
    sync = engines(byte_checkpoint)
    pieces = ["Dear ", Hole(3, name="who", fill="up_to"), ", ", Hole(4, regex="[a-f]+"), "!"]
    drawn = SamplingParams(seed=4, block_length=6, schedule="mdlm", steps_per_block=2)
    quick = SamplingParams(seed=5, quality="balanced", stop="q")

    async def talk() -> None:
        async with AsyncLLM(str(byte_checkpoint), device="cpu") as llm:
            for params in (drawn, GREEDY):
                (expected,) = sync.infill([pieces], params, use_tqdm=False)
                assert await llm.infill(pieces, params) == expected
            one = ["a", Hole(6, fill="up_to"), "b" * 5000]
            with pytest.raises(ContextLengthError, match="template has 5007 positions"):
                await llm.infill(one, quick)
            one = ["a", Hole(6, fill="up_to"), "b"]
            (expected,) = sync.infill([one], quick, use_tqdm=False)
            assert await llm.infill(one, quick) == expected
            for bad in ("text", 5, ["no hole"]):
                with pytest.raises(PromptError, match="template"):
                    await llm.infill(bad)  # type: ignore[arg-type]
            made = [SamplingParams(seed=n, temperature=0.9) for n in range(5)]
            expected = sync.infill([pieces] * 5, made, use_tqdm=False)
            assert await asyncio.gather(*(llm.infill(pieces, p) for p in made)) == expected

    asyncio.run(talk())


WANTED: list[tuple[Hole, str]] = [
    (Hole(4, regex="[ab]+"), "[ab]{4}"),
    (Hole(6, regex="[ab]+", fill="up_to"), "[ab]{1,6}"),
    (Hole(3, choice=["one", "two", "seven"]), "one|two"),
    (Hole(6, choice=["one", "two", "seven"], fill="up_to"), "one|two|seven"),
    (Hole(9, json_schema={"type": "integer", "minimum": 5}, fill="up_to"), "[5-9]|[1-9][0-9]+"),
    (Hole(4, json_schema={"enum": [True, None, False]}), "true|null"),
]


@pytest.mark.parametrize("unmask", ["steps", "threshold", "factor", "entropy_bound", "wino"])
def test_each_hole_has_its_own_constraint(
    engines: Engines, byte_checkpoint: Path, unmask: str
) -> None:
    """Beside holes without one, alone and in batches; what they ask for holds whatever is drawn."""
    llm, pieces = engines(byte_checkpoint), list[Any]()
    for place, (hole, _) in enumerate(WANTED):
        pieces += [hole, f" {place} ", *([Hole(2), "|"] if place % 2 else [])]
    params = [
        SamplingParams(
            temperature=0.9 * (seed % 3),
            seed=seed,
            unmask=unmask,
            threshold=0.1,
            block_length=(None, 7, 16)[seed % 3],
        )
        for seed in range(6)
    ]
    found = llm.infill([pieces] * 6, params, use_tqdm=False)
    assert [llm.infill([pieces], one, use_tqdm=False)[0] for one in params] == found
    for one in found:
        holes = [hole["text"] for hole in one["holes"]]
        asked = [p for p in pieces if isinstance(p, Hole)]
        texts = [text for text, hole in zip(holes, asked, strict=True) if hole.constraints]
        for text, (hole, pattern) in zip(texts, WANTED, strict=True):
            assert re.fullmatch(pattern, text), (hole, text)


def test_what_fits_no_hole_is_refused(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    for hole, why in (
        (Hole(2, regex="abc"), "shortest text that matches has 3 tokens, and the length of hole 1"),
        (Hole(4, regex="(abc)+"), r"exactly 4 tokens, .* let the hole end \(fill='up_to'\)"),
        (Hole(4, regex="a(?=b)"), "look"),
    ):
        with pytest.raises(InvalidParameterError, match=why):
            llm.infill([["a", Hole(1), "b", hole]], GREEDY, use_tqdm=False)
    many = [piece for _ in range(17) for piece in (Hole(1, regex="a"), "b")]
    with pytest.raises(
        InvalidParameterError, match="17 holes have a constraint, and a request may"
    ):
        llm.infill([many], GREEDY, use_tqdm=False)


def test_holes_that_need_no_forward(engines: Engines, byte_checkpoint: Path) -> None:
    """What can be one text alone is written by the host, ends before the last hole among it."""
    llm = engines(byte_checkpoint)
    assert llm.tokenizer is not None
    (end, *_) = llm.spec.eos_ids
    pieces = [Hole(3, regex="abc"), "-", Hole(4, choice=["de"], fill="up_to"), "-", Hole(2)]
    (found,) = llm.infill([pieces], GREEDY, use_tqdm=False)
    helpers.check_idle(llm)
    assert [hole["text"] for hole in found["holes"][:2]] == ["abc", "de"]
    assert len(found["holes"][2]["token_ids"]) == 2
    assert found["holes"][1]["token_ids"] == [*llm.tokenizer.encode("de"), end]
    assert found["usage"]["forward_passes"] == 2
    (found,) = llm.infill([pieces[:4]], GREEDY, use_tqdm=False)
    assert (found["text"], found["usage"]["forward_passes"]) == ("abc-de-", 0)
    assert found["finish_reason"] == "stop"


def test_stop_cuts_a_hole(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    assert llm.tokenizer is not None
    (letter,) = llm.tokenizer.encode("q")
    given = {"temperature": 0.0, "logit_bias": {letter: 100.0}}
    pieces = ["ab", Hole(6, fill="up_to"), "cd"]
    (found,) = llm.infill([pieces], SamplingParams(**given, stop="qqq"), use_tqdm=False)
    assert (found["text"], found["holes"][0]["text"]) == ("abcd", "")
    assert found["holes"][0]["token_ids"] == [letter] * 3
    assert found["finish_reason"] == "stop"
    (found,) = llm.infill([pieces], SamplingParams(**given), use_tqdm=False)
    assert (found["text"], found["finish_reason"]) == ("abqqqqqqcd", "length")
