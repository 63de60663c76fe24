"""Streams of the OpenAI endpoints: pieces of committed text, and how they end."""

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError
from dllmserve.outputs import RequestOutput
from dllmserve.process.calls import Delta
from tests.server.stand_in import Reply, run, serving, until

COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def texts(answer: Reply) -> dict[int, str]:
    """All pieces of each choice together."""
    found: dict[int, str] = defaultdict(str)
    for _, chunk in answer.events():
        for choice in [] if chunk == "[DONE]" else chunk.get("choices", []):
            found[choice["index"]] += choice.get("text", "") or choice.get("delta", {}).get(
                "content", ""
            )
    return dict(found)


def chunks(answer: Reply) -> list[Any]:
    """The pieces; the last event must be [DONE]."""
    events = [data for _, data in answer.events()]
    assert events[-1] == "[DONE]" and "[DONE]" not in events[:-1]
    return events[:-1]


def test_a_chat_in_pieces(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            given = {"messages": HI, "max_tokens": 6}
            whole = (await server.post(CHAT, given)).json()["choices"][0]
            answer = await server.post(CHAT, {**given, "stream": True})
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-store"
            assert "content-length" not in answer.headers
            first, *middle, last = chunks(answer)
            assert first["choices"] == [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            ]
            assert all(set(c["choices"][0]["delta"]) == {"content"} for c in middle)
            assert len(middle) > 1
            assert last["choices"][0]["delta"] == {}
            assert last["choices"][0]["finish_reason"] == "length"
            for chunk in (first, *middle, last):
                assert chunk["object"] == "chat.completion.chunk"
                assert chunk["id"] == first["id"] and chunk["id"].startswith("chatcmpl-")
                assert "usage" not in chunk
            assert texts(answer) == {0: whole["message"]["content"]}
            assert server.engine.calls[-1].submit.stream

    run(main())


def test_completions_in_pieces_with_echo_and_usage(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            given = {"prompt": ["abc", "xy"], "n": 2, "max_tokens": 8, "echo": True, "stop": "bca"}
            whole = (await server.post(COMPLETE, given)).json()
            options = {"include_usage": True}
            answer = await server.post(
                COMPLETE, {**given, "stream": True, "stream_options": options}
            )
            *pieces, last = chunks(answer)
            assert texts(answer) == {c["index"]: c["text"] for c in whole["choices"]}
            assert texts(answer)[0] == "abca" and texts(answer)[2] == "xyxyxyxyxy"
            assert all(chunk["usage"] is None for chunk in pieces)
            assert last["choices"] == []
            for usage in (last["usage"], whole["usage"]):
                del usage["queue_time"]
            assert last["usage"] == whole["usage"]
            ends = {
                c["index"]: c["finish_reason"]
                for chunk in pieces
                for c in chunk["choices"]
                if c["finish_reason"]
            }
            assert ends == {0: "stop", 1: "stop", 2: "length", 3: "length"}

    run(main())


def test_choices_come_as_they_are_committed(byte_checkpoint: Path) -> None:
    """None waits for another one, and none is cut short by the end of another."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            given = {"prompt": "ab", "n": 2, "max_tokens": 4, "stream": True}
            asked = server.begin("POST", COMPLETE, given)
            await until(lambda: len(server.engine.calls) == 2)
            first, second = server.engine.calls
            for call, text in ((second, b"ab"), (first, b"ba"), (second, b"c")):
                call.start()
                call.put(Delta([byte - 33 for byte in text]))
                await asked.until(b'"text":"' + text)
            server.engine.play(second, [64, 65, 66, 67])
            await asked.until(b'"finish_reason":"length"')
            first.put(Delta([64]))
            await asked.until(b'"index":0,"text":"a"')
            server.engine.play(first, [65, 64, 64, 64])
            answer = await asked.reply()
            order = [c["choices"][0]["index"] for c in chunks(answer)]
            assert order[:3] == [1, 0, 1] and order[-1] == 0

    run(main())


def test_usage_so_far(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            options = {"continuous_usage_stats": True, "include_usage": True}
            given = {"prompt": "ab", "max_tokens": 8, "stream": True, "stream_options": options}
            usages = [chunk["usage"] for chunk in chunks(await server.post(COMPLETE, given))]
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 8
            # what is known at the end alone is left out before, and is never a 0 that means nothing
            late = {"forward_passes", "tokens_per_forward", "prompt_tokens_details"}
            assert not late & usages[0].keys() and late <= usages[-1].keys()
            assert all(usage.get("forward_passes", 1) > 0 for usage in usages)

    run(main())


def test_half_a_character_and_half_a_stop_string_are_held_back(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            given = {"prompt": "ab", "max_tokens": 16, "stop": ["END"], "stream": True}
            asked = server.begin("POST", COMPLETE, given)
            await until(lambda: len(server.engine.calls) == 1)
            call = server.engine.calls[0]
            tokenizer = server.service.llm.tokenizer
            assert tokenizer is not None
            ids = tokenizer.encode("é✓ENEND!")
            call.start()
            for token in ids[:-2]:  # up to "ENEN"
                call.put(Delta([token]))
            await asked.until("✓".encode())
            await asyncio.sleep(0.01)
            assert texts(Reply(200, {}, asked.body)) == {0: "é✓EN"}
            call.end(server.engine.output(call, ids))
            answer = await asked.reply()
            assert texts(answer) == {0: "é✓EN"}
            assert chunks(answer)[-1]["choices"][0]["finish_reason"] == "stop"

    run(main())


def test_an_error_after_the_start_is_an_event(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            asked = server.begin("POST", CHAT, {"messages": HI, "n": 2, "stream": True})
            await until(lambda: len(server.engine.calls) == 2)
            first, second = server.engine.calls
            first.start()
            first.put(Delta([64, 65]))
            await asked.until(b'"content":"ab"')
            first.end(EngineDiedError("SIGKILL at /some/where"))
            answer = await asked.reply()
            assert answer.status == 200
            error = chunks(answer)[-1]
            assert set(error) == {"error"}
            assert error["error"]["type"] == "server_error"
            assert error["error"]["code"] == "engine_died"
            assert set(error["error"]) == {"message", "type", "param", "code"}
            assert "some/where" not in error["error"]["message"]
            assert server.engine.aborted == [second] and server.idle()

    run(main())


def test_a_deadline_in_a_stream(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            given = {"prompt": "a", "stream": True, "timeout": 0.03}
            (error,) = chunks(await server.post(COMPLETE, given))
            assert error["error"]["type"] == "timeout"
            assert server.metric("requests_aborted_total", reason="deadline") == 1
            assert server.metric("request_failure_total") == 0

    run(main())


def test_keep_alives(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, sse_keep_alive=0.02) as server:
            server.engine.hold = True
            asked = server.begin("POST", COMPLETE, {"prompt": "a", "stream": True})
            await asked.until(b": keep-alive\n\n: keep-alive\n\n")
            server.engine.play(server.engine.calls[0])
            assert texts(await asked.reply()) == {0: "a" * 128}

    run(main())


@pytest.mark.parametrize("reads", [True, False], ids=["reader", "stuck reader"])
def test_a_client_that_leaves_in_the_middle(byte_checkpoint: Path, reads: bool) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            asked = server.begin("POST", COMPLETE, {"prompt": "a", "n": 2, "stream": True})
            await until(lambda: len(server.engine.calls) == 2)
            for call in server.engine.calls:
                call.start()
                call.put(Delta([64]))
            await asked.until(b'"index":1')
            if not reads:
                asked.reading.clear()
                for call in server.engine.calls:
                    call.put(Delta([65]))
                await asyncio.sleep(0.01)
            await asked.left()
            assert server.idle() and len(server.engine.aborted) == 2
            assert server.metric("requests_aborted_total", reason="disconnect") == 2
            left = [t for t in asyncio.all_tasks() if "read" in str(t.get_coro())]
            assert left == []

    run(main())


def test_times_of_a_stream(byte_checkpoint: Path) -> None:
    """First text and the time per token count tokens, not pieces."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            asked = server.begin(
                "POST", COMPLETE, {"prompt": "a", "max_tokens": 42, "stream": True}
            )
            await until(lambda: len(server.engine.calls) == 1)
            call = server.engine.calls[0]
            call.start()
            call.put(Delta([64, 64]))
            await asked.until(b'"text":"aa"')
            await asyncio.sleep(0.4)
            # the last forty ids come with the output: 10 ms each
            output = RequestOutput("a" * 42, [64] * 42, "length", 1, 42, 42)
            call.end(output)
            await asked.reply()
            assert server.metric("time_to_first_token_seconds_count") == 1
            assert server.metric("inter_token_latency_seconds_count") == 1
            assert 0.009 < server.metric("inter_token_latency_seconds_sum") < 0.2

    run(main())
