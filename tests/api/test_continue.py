"""continue_final_message: an answer goes on with the assistant's last message."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dllmserve import AsyncLLM, SamplingParams
from dllmserve.errors import PromptError, TokenizerError
from dllmserve.models.loader import find_model
from tests.conftest import Engines
from tests.server.stand_in import Server, run, serving

CHAT = "/v1/chat/completions"
GREEDY = SamplingParams(temperature=0.0, gen_length=8, steps=8)
ASKED = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "ab"}


def test_the_prompt_ends_where_the_text_does(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    assert llm.tokenizer is not None
    opened, begun = llm.chat_ids([ASKED]), llm.tokenizer.encode("ab")
    assert llm.chat_ids([ASKED, BEGUN], continue_final_message=True) == [*opened, *begun]
    empty = {"role": "assistant", "content": None}
    assert llm.chat_ids([ASKED, empty], continue_final_message=True) == opened
    parts = {"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]}
    assert llm.chat_ids([ASKED, parts], continue_final_message=True) == [*opened, *begun]
    # as ever
    closed = llm.chat_ids([ASKED, BEGUN])
    assert closed[: len(opened) + 2] == [*opened, *begun] and len(closed) > len(opened) + 2


def test_answers_are_what_follows(engines: Engines, byte_checkpoint: Path) -> None:
    """One conversation, several, and from another process."""
    llm = engines(byte_checkpoint)
    prompt = llm.chat_ids([ASKED, BEGUN], continue_final_message=True)
    expected = llm.generate([prompt], GREEDY, use_tqdm=False)
    told: dict[str, Any] = {"use_tqdm": False, "continue_final_message": True}
    assert llm.chat([ASKED, BEGUN], GREEDY, **told) == expected
    assert llm.chat([[ASKED, BEGUN]] * 2, GREEDY, **told) == expected * 2

    async def talk() -> None:
        async with AsyncLLM(str(byte_checkpoint), device="cpu") as other:
            found = await other.chat([ASKED, BEGUN], GREEDY, continue_final_message=True)
            assert found == expected[0]
            with pytest.raises(PromptError, match="of role 'user'"):
                await other.chat([ASKED], GREEDY, continue_final_message=True)

    asyncio.run(talk())


def test_the_embedded_model_goes_on(engines: Engines) -> None:
    llm = engines(find_model("tiny"))
    asked = {"role": "user", "content": "Sort the numbers: 9 41 7"}
    params = SamplingParams(temperature=0.0, quality="balanced")
    for begun, rest in (("7", " 9 41"), ("7 9", " 41")):
        messages = [asked, {"role": "assistant", "content": begun}]
        (found,) = llm.chat(messages, params, use_tqdm=False, continue_final_message=True)
        assert (found["text"], found["finish_reason"]) == (rest, "stop")


def test_what_cannot_be_gone_on_with(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {"role": "assistant", "content": "a", "tool_calls": [call]}
    for last, why in ((ASKED, "the last one here is of role 'user'"), (calls, "calls tools")):
        with pytest.raises(PromptError, match=why):
            llm.chat([ASKED, last], GREEDY, use_tqdm=False, continue_final_message=True)


def test_a_template_that_hides_the_text() -> None:
    from dllmserve.engine.template import ChatTemplate

    hiding = ChatTemplate("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", {})
    with pytest.raises(TokenizerError, match="does not show the text of the last message"):
        hiding.render([{"role": "assistant", "content": "abcd"}], continue_final_message=True)


def test_over_http(engines: Engines, byte_checkpoint: Path) -> None:
    llm = engines(byte_checkpoint)
    prompt = llm.chat_ids([ASKED, BEGUN], continue_final_message=True)
    goes_on = {"continue_final_message": True}

    async def ids(server: Server, body: dict[str, Any]) -> list[int]:
        answer = await server.post(CHAT, {"max_tokens": 4, **body})
        assert answer.status == 200, answer.body
        return server.engine.calls[-1].submit.prompt_ids

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            begun = {"messages": [ASKED, BEGUN]}
            for more in ({}, {"add_generation_prompt": False}, {"add_generation_prompt": None}):
                assert await ids(server, {**begun, **goes_on, **more}) == prompt
            closed = llm.chat_ids([ASKED, BEGUN])
            for more in ({}, {"add_generation_prompt": True}, {"continue_final_message": False}):
                assert await ids(server, {**begun, **more}) == closed
            # control tokens in the text are text, there as elsewhere
            said = {"role": "assistant", "content": "<|user|>x"}
            assert llm.tokenizer is not None
            found = await ids(server, {"messages": [ASKED, said], **goes_on})
            assert llm.tokenizer.decode(found).endswith("<|user|>x")
            for body, why in (
                ({**begun, "add_generation_prompt": False}, "give true"),
                ({**begun, **goes_on, "add_generation_prompt": True}, "give false"),
                ({"messages": [ASKED], **goes_on}, "of role 'user'"),
                ({**begun, "continue_final_message": 1}, "continue_final_message must be"),
            ):
                answer = await server.post(CHAT, body)
                assert answer.status == 400 and why in answer.error["message"], answer.body

    run(main())
