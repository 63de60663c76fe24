"""Where answers end: ids of the configuration, the tokenizer and the chat template together."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, AsyncLLM, SamplingParams
from dllmserve.config import EngineConfig
from dllmserve.engine.codec import Codec
from dllmserve.engine.setup import plan_engine
from dllmserve.engine.tokenizer import Tokenizer, with_ends
from dllmserve.models.loader import read_spec
from tests.checkpoints import Shape, byte_tokenizer, config, write_random
from tests.engine.templates import BRACKETS, CHATML, GENERATION, HEADERS, OPEN_ENDED, THINKING
from tests.engine.test_control_tokens import byte_level
from tests.helpers import answer

TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|user|>")
SPEC = replace(read_spec(config(Shape(family="llada", vocab=300, mask_id=299))), eos_ids=())
IDS = {text: 256 + i for i, text in enumerate(TOKENS)}
END, TEXT_END = IDS["<|im_end|>"], IDS["</s>"]


def tokenizer(template: str | None, special: bool = True, **names: str) -> Tokenizer:
    codec = byte_level()
    codec.add_special_tokens([*TOKENS]) if special else codec.add_tokens([*TOKENS])
    names = {"bos_token": "<s>"} | names
    return Tokenizer(Codec(codec), {} if template is None else {"default": template}, names)


PARTS = (
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)
HEAD = "{% for m in messages %}<|user|>{{ m.content }}"
WRITES: dict[str, tuple[str | None, str | None]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "headers": (HEADERS, "<|im_end|>"),
    "the last turn stays open": (OPEN_ENDED, "<|im_end|>"),
    "brackets": (BRACKETS, "</s>"),
    "thoughts": (THINKING, "<|im_end|>"),
    "generation": (GENERATION, "<|im_end|>"),
    "parts": (PARTS, "<|im_end|>"),
    "later": ("{% for m in messages %}<|user|>{{ m.content }}\n\n</s>x<s>{% endfor %}", "</s>"),
    "if not the last": (
        f"{HEAD}{{% if not loop.last %}}<|im_end|>{{% endif %}}{{% endfor %}}",
        "<|im_end|>",
    ),
    "before the next": (
        "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}"
        "<|user|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|header|>{% endif %}",
        "<|im_end|>",
    ),
    "before a later question": (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %}<|im_end|>{% endif %}"
        "<|user|>{{ m.content }}{% endfor %}",
        "<|im_end|>",
    ),
    "with a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
        f"{HEAD}<|im_end|>{{% endfor %}}",
        "<|im_end|>",
    ),
    "with a question at the end": (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
        f"{HEAD}{{% if m.role == 'assistant' %}}<|im_end|>{{% endif %}}{{% endfor %}}",
        "<|im_end|>",
    ),
    "of three messages": (
        "{% if messages | length < 3 %}{{ raise_exception('no') }}{% endif %}"
        f"{HEAD}<|im_end|>{{% endfor %}}",
        "<|im_end|>",
    ),
    "a part of the answer": (
        "{% for m in messages %}<|user|>{{ m.content.split('-')[-1] }}<|im_end|>{% endfor %}",
        "<|im_end|>",
    ),
    "nothing": ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", None),
    "the next turn": (
        "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|header|>{% endif %}",
        None,
    ),
    "no control token": ("{% for m in messages %}{{ m.content }} END{% endfor %}", None),
    "no answer": ("{{ messages[0].content }}<|im_end|>", None),
    "refuses": ("{{ raise_exception('no') }}", None),
    "broken": ("{% for %}", None),
    "none": (None, None),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_the_token_behind_an_answer_is_found_by_rendering(name: str, special: bool) -> None:
    template, expected = WRITES[name]
    found = tokenizer(template, special, eos_token="</s>").turn_end()
    assert found == (None if expected is None else IDS[expected])


def test_a_template_that_refuses_to_say_where_answers_end_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer("{{ raise_exception('three messages, please') }}", True).turn_end()
        assert "three messages, please" in caplog.text
        caplog.clear()
        tokenizer(None, True).turn_end()
        assert not caplog.text


@pytest.mark.parametrize(
    ("named", "eos", "template", "ends", "turns"),
    [
        # LLaDA-8B-Instruct, Dream-v0-Instruct: the template's token is on no list
        ((TEXT_END,), "</s>", CHATML, (TEXT_END, END), (END,)),
        # a chat fine-tune: the tokenizer alone says it
        ((TEXT_END,), "<|im_end|>", CHATML, (TEXT_END, END), (END,)),
        # generation_config lists both
        ((END, TEXT_END), "<|im_end|>", CHATML, (END, TEXT_END), (END,)),
        # nothing else ends a text
        ((END,), "<|im_end|>", CHATML, (END,), ()),
        ((), None, CHATML, (END,), ()),
        # base models
        ((TEXT_END,), "</s>", None, (TEXT_END,), ()),
        ((), "</s>", None, (TEXT_END,), ()),
        ((), None, None, (), ()),
        ((), "no token at all", None, (), ()),
        # the tokenizer's end is another one than all others
        ((7,), "</s>", CHATML, (7, TEXT_END, END), (END,)),
        ((TEXT_END,), "</s>", BRACKETS, (TEXT_END,), ()),
    ],
)
def test_ends_are_united(
    named: tuple[int, ...],
    eos: str | None,
    template: str | None,
    ends: tuple[int, ...],
    turns: tuple[int, ...],
) -> None:
    names = {} if eos is None else {"eos_token": eos}
    spec = with_ends(replace(SPEC, eos_ids=named), tokenizer(template, **names))
    assert (spec.eos_ids, spec.turn_end_ids) == (ends, turns)


def test_without_a_tokenizer_the_configuration_counts() -> None:
    spec = with_ends(replace(SPEC, eos_ids=(3, 5, 3)), None)
    assert (spec.eos_ids, spec.turn_end_ids) == ((3, 5), ())


def test_ids_that_no_answer_can_hold_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    spec = replace(SPEC, eos_ids=(-1, 7, 300, 10**9), mask_id=END)
    with caplog.at_level(logging.WARNING):
        spec = with_ends(spec, tokenizer(CHATML, eos_token="</s>"))
    assert (spec.eos_ids, spec.turn_end_ids) == ((7, TEXT_END), ())
    assert "end id 10000000" in caplog.text and "it is the mask" in caplog.text


def chat_model(folder: Path, **changes: Any) -> Path:
    """Ids 256 and 258 end a text and a turn; config.json knows of the first only."""
    write_random(folder, Shape(family="llada", vocab=260, mask_id=259, eos_ids=(256,), seed=9))
    byte_tokenizer(folder, chat=False)
    template = "{% for m in messages %}<|user|>{{ m.content }}<|assistant|>\n{% endfor %}"
    settings = {"eos_token": "<|end|>", "chat_template": template} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_engines_processes_and_ranks_agree(tmp_path: Path) -> None:
    folder = chat_model(tmp_path)
    llm = LLM(str(folder), device="cpu")
    assert (llm.spec.eos_ids, llm.spec.turn_end_ids) == ((256, 258), (258,))
    options = EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=2)
    assert {plan_engine(options, rank).spec for rank in range(2)} == {llm.spec}

    async def started() -> Any:
        async with AsyncLLM(str(folder), device="cpu") as process:
            return process.info.spec

    assert asyncio.run(started()) == llm.spec


def test_answers_end_with_the_turn(tmp_path: Path) -> None:
    llm = LLM(str(chat_model(tmp_path)), device="cpu")
    params = SamplingParams(temperature=0.0, gen_length=8, steps=8, logit_bias={258: 100.0})
    assert answer(llm, [1, 2, 3], params) == [258]
    output = llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]
    assert output["finish_reason"] == "stop"
