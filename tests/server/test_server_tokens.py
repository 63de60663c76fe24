"""/tokenize, /detokenize and /version."""

from pathlib import Path
from typing import Any

from dllmserve import __version__
from tests.server.stand_in import MAX_LEN, run, serving

HI = [{"role": "user", "content": "Hi"}]
H, LOW_I, USER, END, ASSISTANT = 39, 72, 257, 256, 258
TOOL = {"type": "function", "function": {"name": "add"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
    ("/tokenize", {"prompt": "a" * (16 * MAX_LEN + 1)}, "prompt"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": False}, "add_special_tokens"),
    ("/tokenize", {"messages": HI, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
    ("/detokenize", {"tokens": []}, "tokens"),
    ("/detokenize", {"tokens": [260]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
]


def test_tokens(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            told = {"max_model_len": MAX_LEN, "token_strs": None}
            answer = await server.post("/tokenize", {"model": "byte-llada", "prompt": "Hi"})
            assert answer.json() == {**told, "count": 2, "tokens": [H, LOW_I]}
            answer = await server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True})
            assert answer.json()["token_strs"] == ["H", "i"]
            answer = await server.post("/tokenize", {"messages": HI})
            ids = [USER, H, LOW_I, END, ASSISTANT]
            assert answer.json() == {**told, "count": 5, "tokens": ids}
            longer = (await server.post("/tokenize", {"messages": HI, "tools": [TOOL]})).json()
            text = await server.post("/detokenize", {"tokens": longer["tokens"]})
            assert '"name": "add"' in text.json()["prompt"] and longer["count"] > MAX_LEN
            answer = await server.post("/detokenize", {"tokens": [H, END, LOW_I]})
            assert answer.json() == {"prompt": "Hi"}
            assert (await server.get("/version")).json() == {"version": __version__}
            for path in ("/tokenize", "/detokenize"):
                frame = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
                answer = await server.post(path, {"model": "other", **frame})
                assert (answer.status, answer.error["code"]) == (404, "model_not_found")

    run(main())


def test_what_is_refused(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            for path, given, param in REFUSED:
                answer = await server.post(path, given)
                assert answer.status == 400, (path, given, answer.body)
                assert answer.error["param"] == param, (given, answer.error)

    run(main())
