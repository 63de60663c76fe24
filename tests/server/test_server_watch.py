"""The native event stream: canvases step by step, for people who want to watch."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dllmserve.errors import EngineDiedError
from dllmserve.process import calls
from dllmserve.process.calls import Call, Started
from dllmserve.process.messages import Submit
from dllmserve.sampling_params import SamplingParams
from tests.server.stand_in import canvas, run, serving, until

BODY = {"prompt": "ab", "gen_length": 4, "seed": 1}


def test_events_tell_what_changed(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            answer = await server.post("/v1/generate/stream", BODY)
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = answer.events()
            assert [name for name, _ in events] == ["started", *["step"] * 4, "done"]
            assert events[0][1]["queue_time"] >= 0
            first, second = events[1][1], events[2][1]
            assert first == {
                "forward_passes": 1,
                "block": [0, 4],
                "length": 4,
                "changed": [
                    {
                        "position": 0,
                        "token_id": 64,
                        "text": "a",
                        "committed": True,
                        "confidence": None,
                    },
                    {
                        "position": 1,
                        "token_id": 65,
                        "text": "b",
                        "committed": False,
                        "confidence": 0.5,
                    },
                ],
            }
            assert [c["position"] for c in second["changed"]] == [1, 2]
            # played back, the changes give the whole canvas
            cells: dict[int, Any] = {}
            for _, step in events[1:-1]:
                cells |= {c["position"]: c for c in step["changed"]}
            assert "".join(cells[i]["text"] for i in range(4)) == "abab"
            assert all(cell["committed"] for cell in cells.values())
            assert events[-1][1]["text"] == "abab"
            assert events[-1][1]["usage"]["forward_passes"] == 4
            assert server.engine.calls[0].submit.watch
            assert server.metric("request_success_total", finished_reason="length") == 1

    run(main())


def test_a_watcher_who_leaves_drops_the_request(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            watching = server.begin("POST", "/v1/generate/stream", BODY)
            await until(lambda: len(server.engine.calls) == 1)
            call = server.engine.calls[0]
            call.start()
            call.put(canvas([64, 65, 64, 65], 1))
            await watching.until(b"event: step")
            await watching.left()
            assert server.engine.aborted == [call] and server.idle()
            assert server.metric("requests_aborted_total", reason="disconnect") == 1

    run(main())


def test_one_who_has_left_before_the_answer_began(byte_checkpoint: Path) -> None:
    """The events are never asked for then, so they cannot clean up."""

    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            for path, given in (
                ("/v1/generate/stream", BODY),
                ("/v1/completions", {"prompt": "ab", "stream": True}),
                ("/v1/completions", {"prompt": "ab", "n": 2}),
            ):
                watching = server.begin("POST", path, given)
                watching.reading.clear()
                before = len(server.engine.calls)
                await until(lambda seen=before: len(server.engine.calls) > seen)
                watching.task.cancel()
                watching.reading.set()
                await asyncio.wait({watching.task})
                assert server.idle(), path
            assert not server.engine.open_calls

    run(main())


def test_failures_are_events(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            server.engine.hold = True
            watching = server.begin("POST", "/v1/generate/stream", BODY)
            await until(lambda: len(server.engine.calls) == 1)
            server.engine.calls[0].end(EngineDiedError("died of SIGKILL in /secret/place"))
            name, error = (await watching.reply()).events()[-1]
            assert name == "error" and error["code"] == "engine_died"
            assert "secret" not in error["message"]
            assert server.metric("request_failure_total", reason="engine_died") == 1
            assert server.metric("requests_aborted_total") == 0

            late = await server.post("/v1/generate/stream", {**BODY, "timeout": 0.02})
            assert late.events()[-1][1]["code"] == "deadline_exceeded"
            assert server.metric("requests_aborted_total", reason="deadline") == 1
            assert server.metric("request_failure_total", reason="deadline_exceeded") == 0

    run(main())


def test_a_fault_of_ours_ends_the_stream_with_an_event(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            tokenizer = server.service.llm.tokenizer
            assert tokenizer is not None

            def broken(ids: Any) -> str:
                raise RuntimeError("a fault on purpose")

            monkeypatch.setattr(tokenizer, "decode", broken)
            name, error = (await server.post("/v1/generate/stream", BODY)).events()[-1]
            assert name == "error" and error["code"] == "server_error"
            assert "purpose" not in error["message"]
            streamed = {"prompt": "ab", "max_tokens": 6, "stream": True}
            events = (await server.post("/v1/completions", streamed)).events()
            assert events[-1] == ("", "[DONE]")
            assert events[-2][1]["error"]["type"] == "server_error"
            assert server.idle()

    run(main())
    logged = [r.exc_info[1] for r in caplog.records if r.exc_info and r.levelname == "ERROR"]
    assert [str(error) for error in logged] == ["a fault on purpose"] * 2


def test_a_slow_watcher_costs_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_WAITING_CELLS", 32)

    async def main() -> None:
        call = Call(Submit([1], SamplingParams(), watch=True))
        call.start()
        for done in range(1, 101):
            call.put(canvas(list(range(8)), done))
        assert isinstance(await call.next(), Started)
        # the newest are kept, and what is taken makes room again
        seen = [(await call.next()).forward_passes for _ in range(4)]  # type: ignore[union-attr]
        assert seen == [97, 98, 99, 100]
        for done in range(101, 104):
            call.put(canvas(list(range(8)), done))
        seen = [(await call.next()).forward_passes for _ in range(3)]  # type: ignore[union-attr]
        assert seen == [101, 102, 103]
        # one canvas over the bound is still given
        call.put(canvas(list(range(64)), 1))
        call.put(canvas(list(range(64)), 2))
        assert (await call.next()).forward_passes == 2  # type: ignore[union-attr]

    run(main())


def test_keep_alives_come_while_nothing_happens(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, sse_keep_alive=0.02) as server:
            server.engine.hold = True
            watching = server.begin("POST", "/v1/generate/stream", BODY)
            await watching.until(b": keep-alive\n\n: keep-alive\n\n")
            server.engine.play(server.engine.calls[0])
            answer = await watching.reply()
            assert answer.events()[-1][0] == "done"
            assert b": keep" not in answer.body.partition(b"event: started")[2]

    run(main())
