"""Log-probabilities in OpenAI's shapes, whole and in streams."""

from pathlib import Path
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.server.stand_in import Server, run, serving

COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
ADD = {"type": "function", "function": {"name": "add"}}


def entry(token: str, *others: tuple[str, float]) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    top = [one(token, -0.5), *(one(*other) for other in others)]
    return {**one(token, -0.5), "top_logprobs": top if others else []}


async def logprobs(server: Server, path: str, body: dict[str, Any]) -> Any:
    """Of a whole answer; a stream's pieces have to make the same."""
    answer = await server.post(path, body)
    assert answer.status == 200, answer.body
    (choice,) = answer.json()["choices"]
    events = (await server.post(path, {**body, "stream": True})).events()
    found: dict[str, Any] = {}
    for _, data in events[:-1]:
        for key, value in (data["choices"][0]["logprobs"] or {}).items():
            found[key] = found[key] + value if isinstance(found.get(key), list) else value
    if choice["logprobs"] is None:
        assert not found
    else:
        assert found == choice["logprobs"]
    return choice["logprobs"]


def test_chats(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_len=4096) as server:
            body: dict[str, Any] = {"messages": HI, "max_tokens": 9}

            async def found(text: str, **given: Any) -> Any:
                server.engine.answer = iter([text] * 2)
                return await logprobs(server, CHAT, {**body, **given})

            assert await found("abc") is None
            assert await found("abc", logprobs=False) is None
            plain = {"content": [entry("a"), entry("b"), entry("c")], "refusal": None}
            assert await found("abc", logprobs=True) == plain
            assert await found("abc", logprobs=True, top_logprobs=0) == plain
            others = ("A", -2.0), ("B", -3.0)
            wanted = [entry(c, *others) for c in "abc"]
            assert (await found("abc", logprobs=True, top_logprobs=3))["content"] == wanted
            # no token of a stop string, nor one that ends the answer
            assert await found("abcde", logprobs=True, stop="d") == plain
            assert await found("abc<|end|>", logprobs=True) == plain
            # parts of a character have no text of their own
            parts = (await found("é", logprobs=True))["content"]
            assert [(part["token"], part["bytes"]) for part in parts] == [("\ufffd", None)] * 2
            # the text of calls has tokens as any other
            text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
            told = await found(text, logprobs=True, tools=[ADD])
            assert "".join(token["token"] for token in told["content"]) == text
            server.engine.answer = iter(["abc"])
            answer = await server.post(CHAT, {**body, "logprobs": True, "top_logprobs": 2})
            ChatCompletion.model_validate(answer.json(), strict=True)

    run(main())


def test_completions(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            body: dict[str, Any] = {"prompt": "a", "max_tokens": 9}

            async def found(text: str, **given: Any) -> Any:
                server.engine.answer = iter([text] * 2)
                return await logprobs(server, COMPLETE, {**body, **given})

            assert await found("abc") is None
            told = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 1]}
            assert await found("ab", logprobs=0) == {**told, "top_logprobs": None}
            tops = [{"a": -0.5, "A": -2.0}, {"b": -0.5, "A": -2.0}]
            assert await found("ab", logprobs=2) == {**told, "top_logprobs": tops}
            found_bytes = await found("é€x", logprobs=1)
            assert found_bytes["text_offset"] == [0, 0, 1, 1, 1, 2]
            server.engine.answer = iter(["abc"])
            answer = await server.post(COMPLETE, {**body, "logprobs": 2})
            Completion.model_validate(answer.json(), strict=True)
            assert server.engine.calls[-1].submit.params.logprobs == 2

    run(main())


def test_what_is_refused(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, given, param, text in (
                (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
                (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "[0, 20]"),
                (COMPLETE, {"logprobs": 21}, "logprobs", "[0, 20]"),
                (COMPLETE, {"logprobs": 1, "echo": True}, "echo", "of the prompt"),
            ):
                frame = {"messages": HI} if path == CHAT else {"prompt": "a"}
                answer = await server.post(path, {**frame, **given})
                assert answer.status == 400
                assert answer.error["param"] == param and text in answer.error["message"], answer

    run(main())
