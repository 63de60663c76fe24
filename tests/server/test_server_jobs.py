"""Jobs: nothing that was accepted is lost, whatever happens around it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dllmserve import SamplingParams, SparseConfig
from dllmserve.errors import EngineDiedError, EngineStartError, JobStoreError
from dllmserve.process.supervisor import State
from dllmserve.server import jobs
from dllmserve.server.service import Run
from dllmserve.server.store import JobRecord, SqliteStore
from tests.server.stand_in import Reply, Server, make_server, run, serving, until

BODY = {"prompt": "ab", "gen_length": 4}


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A job store that outlives its server."""
    return str(tmp_path / "jobs.sqlite3")


async def result(server: Server, id: int, query: str = "?wait=10") -> Reply:
    return await server.get(f"/v1/result/{id}{query}")


async def submitted(server: Server, **given: Any) -> int:
    answer = await server.post("/v1/generate", {**BODY, **given})
    assert answer.status == 200, answer.body
    id: int = answer.json()["request_ids"][0]
    return id


def test_a_restarted_server_finishes_what_was_accepted(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        sparse = {"retention_ratio": 0.25, "default_block_len": 2}
        async with serving(byte_checkpoint, store=store) as first:
            assert await submitted(first, prompt="done") == 0
            assert (await result(first, 0)).json()["text"] == "done"
            assert await submitted(first, prompt="gone") == 1
            assert (await first.ask("DELETE", "/v1/result/1")).status == 204
            first.engine.hold = True
            assert await submitted(first, stop=["x"], logit_bias={"7": 1.5}, sparse=sparse) == 2
            assert await submitted(first, prompt=[3, 4], seed=5) == 3
            await until(lambda: len(first.engine.open_calls) == 2)
            before = [call.submit for call in first.engine.open_calls]
            # whoever waits for one of them is told the truth
            waiting = first.begin("GET", "/v1/result/2?wait=60")
        assert (await waiting.reply()).json()["status"] == "running"
        assert first.metric("requests_aborted_total", reason="shutdown") == 2

        async with serving(byte_checkpoint, store=store) as second:
            assert (await result(second, 2)).json()["text"] == "abab"
            assert (await result(second, 3)).json()["status"] == "finished"
            after = [call.submit for call in second.engine.calls]
            for old, new in zip(before, after, strict=True):
                # the drawn seed included, so that it is the same answer
                assert (old.prompt_ids, old.params) == (new.prompt_ids, new.params)
            assert (await result(second, 0)).json()["text"] == "done"
            assert (await result(second, 1)).status == 410
            assert await submitted(second) == 4

    run(main())


def test_at_the_end_of_a_drain(byte_checkpoint: Path, store: str) -> None:
    """Jobs in a file are left to the next server; those in memory have failed."""

    async def main() -> None:
        for kind, status in ((store, "running"), ("memory", "failed")):
            async with serving(byte_checkpoint, store=kind) as server:
                server.engine.hold = True
                id = await submitted(server)
                await until(lambda s=server: bool(s.engine.calls))
                await server.service.drain(0)
                answer = (await result(server, id, "")).json()
                assert answer["status"] == status
                if kind == "memory":
                    assert "shut down" in answer["error"]
                assert server.metric("requests_aborted_total", reason="shutdown") == 1
                refused = await server.post("/v1/generate", BODY)
                assert refused.status == 503 and "shutting down" in refused.error["message"]

    run(main())


def slow_inserts(server: Server) -> tuple[asyncio.Event, asyncio.Event]:
    """Inserts return when the first event is set; the second says that one is stored."""
    kept = server.jobs._store
    go, stored, insert = asyncio.Event(), asyncio.Event(), kept.insert

    async def slow(records: Any) -> None:
        await insert(records)
        stored.set()
        await go.wait()

    kept.insert = slow  # type: ignore[method-assign]
    return go, stored


def test_a_drain_waits_for_jobs_that_are_being_accepted(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            go, stored = slow_inserts(server)
            posting = server.begin("POST", "/v1/generate", BODY)
            await stored.wait()
            draining = asyncio.create_task(server.service.drain(10))
            await asyncio.sleep(0.05)
            assert not draining.done()
            go.set()
            await draining
            assert (await posting.reply()).status == 200
            assert (await result(server, 0)).json()["text"] == "abab"

    run(main())


@pytest.mark.parametrize("durable", [True, False])
def test_closing_while_a_job_is_accepted(byte_checkpoint: Path, store: str, durable: bool) -> None:
    kind = store if durable else "memory"

    async def main() -> None:
        async with serving(byte_checkpoint, store=kind) as server:
            go, stored = slow_inserts(server)
            posting = server.begin("POST", "/v1/generate", BODY)
            await stored.wait()
            await server.jobs.close()
            go.set()
            answer = await posting.reply()
            assert answer.status == (200 if durable else 503), answer.body
            assert server.idle() and server.engine.calls == [] and not server.jobs._live
        if durable:
            async with serving(byte_checkpoint, store=kind) as server:
                assert (await result(server, 0)).json()["text"] == "abab"

    run(main())


async def filled(store: str, *records: JobRecord) -> None:
    """A store with accepted jobs of a server that is gone."""
    kept = SqliteStore(store)
    await kept.open()
    await kept.reserve_ids(len(records))
    await kept.insert(records)
    await kept.close()


EARLIER = [[65, 66], {"gen_length": 4, "seed": 5}, {"delay_step": 2}]


def test_accepted_jobs_of_earlier_servers(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            server.engine.hold = True
            await submitted(server)
            await until(lambda: bool(server.engine.calls))
            (good,) = await server.jobs._store.unfinished()
        now, packed = good.created, msgspec.msgpack.encode
        wrong = [
            b"\xc1 no message",
            b"",
            packed([[1], {"gen_length": "x"}, None]),
            packed([[1], {"__class__": 1, "nope": 2}, None]),
            packed([[1], {}, {"nope": 2}]),
            packed([[-5, 10**12], {}, None]),
        ]
        await filled(
            store,
            JobRecord(10, "", "byte-llada", now - 60, now + 60, good.request),
            JobRecord(11, "", "another", now, now + 600, good.request),
            JobRecord(12, "", "byte-llada", now - 60, now - 1, good.request),
            # as versions before this one wrote it: what was given, and sparse beside it
            JobRecord(13, "", "byte-llada", now, now + 600, packed(EARLIER)),
            *(JobRecord(20 + n, "", "byte-llada", now, now + 600, w) for n, w in enumerate(wrong)),
        )
        async with serving(byte_checkpoint, store=store) as server:
            assert (await result(server, 13)).json()["status"] == "finished"
            (again,) = [c.submit for c in server.engine.calls if c.submit.prompt_ids == [65, 66]]
            assert again.params == SamplingParams(
                gen_length=4, seed=5, sparse=SparseConfig(delay_step=2)
            )
            parts = {11: "'another'", 12: "the job's time was over", 20: "cannot be read any more"}
            for id, part in {**parts, **dict.fromkeys(range(21, 26), "")}.items():
                answer = (await result(server, id)).json()
                assert answer["status"] == "failed" and part in answer["error"], answer
            assert (await result(server, 10)).json()["status"] == "finished"
            assert (await result(server, 0)).json()["status"] == "finished"
            assert not server.jobs._live

    run(main())


@pytest.mark.parametrize(("used", "left"), [(2.0, 4.0), (0.0, 6.0), (-100.0, 6.0)])
def test_a_job_of_an_earlier_server_has_the_time_that_it_has_left(
    byte_checkpoint: Path,
    store: str,
    used: float,
    left: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the store's clock, whatever that says never more than its own time."""
    given: list[float] = []

    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            server.engine.hold = True
            await submitted(server, timeout=6)
            await until(lambda: bool(server.engine.calls))
            (good,) = await server.jobs._store.unfinished()
            assert good.deadline - good.created == pytest.approx(6)
        app, second = make_server(byte_checkpoint, store=store)
        now = good.created + used
        second.jobs._store.clock = lambda: now  # type: ignore[method-assign]

        def noted(*args: Any, **more: Any) -> Run:
            given.append(more["timeout_s"])
            return Run(*args, **more)

        monkeypatch.setattr(jobs, "Run", noted)
        async with app.router.lifespan_context(app):
            assert (await result(second, 0)).json()["status"] == "finished"
        assert given == [pytest.approx(left)]

    run(main())


def test_a_damaged_result_is_a_503_of_its_job_only(
    byte_checkpoint: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage = {
        0: "UPDATE jobs SET details = x'c1' WHERE id = 0",
        1: "UPDATE jobs SET text = x'ff' WHERE id = 1",
        2: "UPDATE jobs SET text = x'61eda080' WHERE id = 2",  # a lone surrogate
        3: "UPDATE tombstones SET owner = x'ff' WHERE id = 3",
    }

    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            for id in range(5):
                assert await submitted(server) == id
                await result(server, id)
            assert (await server.ask("DELETE", "/v1/result/3")).status == 204
            commits = server.jobs._store._commits  # type: ignore[attr-defined]
            for statement in damage.values():
                await commits.run(lambda tables, s=statement: tables._db.execute(s))
            caplog.clear()
            answers = [await result(server, id, "?details=true") for id in range(5)]
            assert [answer.status for answer in answers] == [503, 503, 200, 503, 200]
            assert {answers[id].error["code"] for id in (0, 1, 3)} == {"job_store_error"}
            assert answers[2].json()["text"] == "a?"
            assert answers[4].json()["text"] == "abab"
            assert (await result(server, 0, "")).json()["text"] == "abab"
        assert not any(record.exc_info for record in caplog.records)

    run(main())


def test_while_the_model_is_being_loaded(byte_checkpoint: Path, store: str) -> None:
    """Results are served, jobs may be awaited and deleted, and nothing is accepted."""

    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            server.engine.hold = True
            for prompt in ("a", "b"):
                await submitted(server, prompt=prompt)
        app, server = make_server(byte_checkpoint, store=store)
        server.engine.loaded.clear()

        async def live() -> None:
            async with app.router.lifespan_context(app):
                await stop.wait()

        stop = asyncio.Event()
        living = asyncio.create_task(live())
        await until(lambda: len(server.jobs._live) == 2)
        waiting = server.begin("GET", "/v1/result/0?wait=60")
        assert (await server.ask("DELETE", "/v1/result/1")).status == 204
        refused = await server.post("/v1/generate", BODY)
        assert refused.status == 503 and "loaded" in refused.error["message"]
        assert server.metric("admission_rejections_total", reason="loading") == 1
        assert not waiting.task.done()
        server.engine.loaded.set()
        assert (await waiting.reply()).json()["text"] == "aaaa"
        assert len(server.engine.calls) == 1
        stop.set()
        await living

    run(main())


def broken(server: Server, name: str, times: int) -> list[Any]:
    """Let an operation of the store fail some times; returns the failed calls."""
    kept, failed = server.jobs._store, []
    real = getattr(kept, name)

    async def fails(*given: Any) -> Any:
        if len(failed) < times:
            failed.append(given)
            raise JobStoreError("the disk is full: /secret/place")
        return await real(*given)

    setattr(kept, name, fails)
    return failed


def test_results_wait_for_a_store_that_fails(
    byte_checkpoint: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllmserve.server.jobs._FIRST_RETRY_S", 0.01)

    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            failed = broken(server, "finish", 3)
            id = await submitted(server)
            await until(lambda: len(failed) >= 1)
            assert (await result(server, id, "")).json()["status"] == "running"
            # its work is done, so its slot is free
            assert server.idle()
            assert (await result(server, id)).json()["text"] == "abab"
            assert len(failed) == 3 and not server.jobs._live

            failed = broken(server, "finish", 10**9)
            id = await submitted(server)
            await until(lambda: len(failed) >= 1)
            waiting = server.begin("GET", f"/v1/result/{id}?wait=60")
            assert (await server.ask("DELETE", f"/v1/result/{id}")).status == 204
            assert (await waiting.reply()).status == 410
            assert not server.jobs._live

    run(main())


def test_what_cannot_be_stored_is_not_accepted(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            broken(server, "insert", 1)
            answer = await server.post("/v1/generate", BODY)
            assert (answer.status, answer.error["code"]) == (503, "job_store_error")
            assert "secret" not in answer.body.decode() and answer.headers["retry-after"]
            assert server.idle() and server.engine.calls == []
            broken(server, "mark_read", 1)
            assert (await result(server, await submitted(server))).status == 200
            for name in ("find", "delete"):
                broken(server, name, 1)
                method = "GET" if name == "find" else "DELETE"
                answer = await server.ask(method, "/v1/result/1")
                assert (answer.status, answer.error["code"]) == (503, "job_store_error")

    run(main())


def test_two_deletes_of_a_stored_job(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            await result(server, await submitted(server))
            both = [server.begin("DELETE", "/v1/result/0") for _ in range(2)]
            assert sorted([(await one.reply()).status for one in both]) == [204, 410]

    run(main())


def test_an_engine_that_is_gone_for_good(byte_checkpoint: Path, store: str) -> None:
    """The next server runs what is not to blame."""

    async def main() -> None:
        for error, blamed in ((EngineStartError("no"), 0), (EngineDiedError("restarts off"), 1)):
            async with serving(byte_checkpoint, store=store) as server:
                server.engine.hold = True
                ids = [await submitted(server, prompt=p) for p in ("began", "waited")]
                await until(lambda s=server: len(s.engine.calls) >= 2)
                server.engine.calls[-2].start()
                await asyncio.sleep(0)
                server.engine.fail(error)
                await until(lambda s=server: not s.jobs._live)
                status = [(await result(server, id, "")).json()["status"] for id in ids]
                assert status == ["failed" if blamed else "running", "running"]
                refused = await server.post("/v1/generate", BODY)
                assert refused.status == 503 and "engine is gone" in refused.error["message"]
            async with serving(byte_checkpoint, store=store) as server:
                assert (await result(server, ids[1])).json()["text"] == "wait"

    run(main())


def test_a_job_outlives_a_queue_timeout(byte_checkpoint: Path) -> None:
    """It was accepted, so it has its own time; a request whose client waits has not."""

    async def main() -> None:
        async with serving(byte_checkpoint, queue_timeout=0.03) as server:
            server.engine.hold = True
            id = await submitted(server)
            given = {"prompt": "a", "max_tokens": 1}
            refused = await server.post("/v1/completions", given)
            assert refused.status == 503 and "queue_timeout=0.03" in refused.error["message"]
            assert refused.headers["retry-after"]
            assert server.metric("requests_aborted_total", reason="deadline") == 1
            server.engine.play(server.engine.calls[0])
            assert (await result(server, id)).json()["text"] == "abab"
            # one that has started in time is not bothered
            asked = server.begin("POST", "/v1/completions", given)
            await until(lambda: len(server.engine.calls) == 3)
            server.engine.calls[2].start()
            await asyncio.sleep(0.08)
            server.engine.play(server.engine.calls[2])
            assert (await asked.reply()).status == 200

    run(main())


def test_a_fault_of_ours_fails_one_job(
    byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            real = server.service.llm.submit

            def faulty(request: Any, **how: Any) -> Any:
                monkeypatch.setattr(server.service.llm, "submit", real)
                raise RuntimeError("a fault on purpose")

            monkeypatch.setattr(server.service.llm, "submit", faulty)
            first, second = await submitted(server), await submitted(server)
            answer = (await result(server, first)).json()
            assert answer["status"] == "failed" and "purpose" not in answer["error"]
            assert (await result(server, second)).json()["text"] == "abab"

    run(main())
    assert "a fault on purpose" in caplog.text


def test_ids_that_are_taken_are_passed_over(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        await filled(store)
        kept = SqliteStore(store)
        await kept.open()
        now = time.time()
        await kept.insert([JobRecord(1, "", "byte-llada", now, now + 600, b"\xc1")])
        await kept.close()
        async with serving(byte_checkpoint, store=store) as server:
            assert await submitted(server) == 0
            assert await submitted(server) == 2

    run(main())


def test_the_engine_is_closed_under_a_job(byte_checkpoint: Path, store: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, store=store) as server:
            server.engine.hold = True
            await submitted(server)
            await until(lambda: bool(server.engine.calls))
            await server.engine.close()
            assert server.engine.state is State.CLOSED
            await until(lambda: not server.jobs._live)
            assert (await result(server, 0, "")).json()["status"] == "running"

    run(main())
