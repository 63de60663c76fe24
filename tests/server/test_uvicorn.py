"""The application under servers that are not ours: ``uvicorn dllmserve.server.app:app``."""

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope
from uvicorn.lifespan.on import LifespanOn

from dllmserve.errors import ConfigError, EngineError, ModelNotFoundError
from dllmserve.server import app as app_module
from dllmserve.server import hosts

KEY = "0123456789abcdef"


def run_uvicorn(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """uvicorn until it ends by itself."""
    command = [sys.executable, "-m", "uvicorn", "dllmserve.server.app:app", "--port", "0", *args]
    return subprocess.run(
        command,
        env={**os.environ, "XDG_STATE_HOME": str(folder), "OMP_NUM_THREADS": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def test_several_workers_are_refused_and_the_parent_ends(tmp_path: Path) -> None:
    done = run_uvicorn(tmp_path, "--workers", "3")
    assert "dllmserve runs in one server process" in done.stdout
    assert "Application startup complete" not in done.stdout
    # refused workers are not started again and again
    assert 1 <= done.stdout.count("runs in one server process") <= 3


def test_a_start_that_fails_says_why_and_ends(tmp_path: Path) -> None:
    done = run_uvicorn(tmp_path, MODEL_PATH="/no/such/model")
    assert done.returncode == 3
    assert "dllmserve cannot start: no directory '/no/such/model'" in done.stdout
    assert "Traceback" not in done.stdout


class Started:
    """The application after its lifespan has begun, without an engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **environ: str) -> None:
        for name in [n for n in os.environ if n.startswith("DLLMSERVE_")]:
            monkeypatch.delenv(name)
        for name, value in {"DLLMSERVE_JOB_STORE": "memory", **environ}.items():
            monkeypatch.setenv(name, value)
        self.app = app_module._FromEnvironment()
        self.sent: list[Message] = []
        self.ended: list[bool] = []

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            self.ended.append(True)

        monkeypatch.setattr(app_module, "_lifespan", lifespan)
        monkeypatch.setattr(app_module, "configure_logging", lambda *_: None)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def get(self, server: object, path: str = "/live", key: str = "") -> tuple[int, Any]:
        """Start, ask once, stop; status and body."""
        steps: asyncio.Queue[Message] = asyncio.Queue()
        steps.put_nowait({"type": "lifespan.startup"})
        living = asyncio.create_task(self.app({"type": "lifespan"}, steps.get, self.send))
        while not self.sent and not living.done():
            await asyncio.sleep(0)
        answers: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            answers.append(message)

        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"x-api-key", key.encode())] if key else [],
            "server": server,
        }
        await self.app(scope, receive, send)
        steps.put_nowait({"type": "lifespan.shutdown"})
        await living
        assert [m["type"] for m in self.sent] == [
            "lifespan.startup.complete",
            "lifespan.shutdown.complete",
        ]
        assert self.ended == [True]
        return answers[0]["status"], json.loads(b"".join(m.get("body", b"") for m in answers[1:]))


@pytest.mark.parametrize(
    "server", [("127.0.0.1", 80), ("127.0.1.1", 80), ("::1", 80), ("/run/a.sock", None)]
)
def test_this_machine_needs_no_key(server: object, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body = asyncio.run(Started(monkeypatch).get(server))
    assert (status, body) == (200, {"status": "loading"})


@pytest.mark.parametrize("server", [("192.0.2.7", 80), ("2001:db8::1", 80), ("name", 80), None])
def test_other_machines_are_refused_without_keys(
    server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn's --host is none of our options, so it cannot be refused at the start."""
    status, body = asyncio.run(Started(monkeypatch).get(server))
    assert status == 401
    assert "DLLMSERVE_API_KEYS" in body["error"]["message"]


def test_other_machines_are_let_in_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch, DLLMSERVE_API_KEYS=KEY)
    status, _ = asyncio.run(started.get(("192.0.2.7", 80), "/v1/models", KEY))
    assert status == 200
    started = Started(monkeypatch, DLLMSERVE_API_KEYS=KEY)
    status, body = asyncio.run(started.get(("192.0.2.7", 80), "/v1/models"))
    assert (status, body["error"]["code"]) == (401, "missing_api_key")


def test_everybody_is_let_in_if_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch, DLLMSERVE_INSECURE_NO_AUTH="true")
    assert asyncio.run(started.get(("192.0.2.7", 80)))[0] == 200


def failed_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception, **environ: str
) -> list[Message]:
    started = Started(monkeypatch, **environ)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise error
        yield

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    monkeypatch.setattr(app_module, "_lifespan", lifespan)
    with pytest.raises((type(error), ConfigError)):
        asyncio.run(started.app({"type": "lifespan"}, receive, started.send))
    return started.sent


def test_a_failed_start_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    (sent,) = failed_start(monkeypatch, ModelNotFoundError("no such model"))
    assert sent["type"] == "lifespan.startup.failed"
    assert sent["message"] == "dllmserve cannot start: no such model"


def test_wrong_options_are_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    (sent,) = failed_start(monkeypatch, AssertionError(), DLLMSERVE_MAX_REQUESTS="many")
    assert sent["message"].endswith("DLLMSERVE_MAX_REQUESTS must be an integer, got 'many'")


def test_a_bug_at_the_start_has_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)
    (sent,) = failed_start(monkeypatch, ZeroDivisionError("oops"))
    assert sent["type"] == "lifespan.startup.failed"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("options", "environ", "name"),
    [
        ({"port": 9123}, {}, "jobs-9123.sqlite3"),
        ({"port": 9123}, {"DLLMSERVE_PORT": "9000"}, "jobs-9123.sqlite3"),
        ({}, {"DLLMSERVE_PORT": "9000"}, "jobs-8000.sqlite3"),  # uvicorn's default
        # here it does not know the port
        ({"port": 0}, {"DLLMSERVE_PORT": "9000"}, "jobs-9000.sqlite3"),
        ({"uds": "/run/a.sock"}, {"DLLMSERVE_PORT": "9000"}, "jobs-9000.sqlite3"),
        ({}, {"DLLMSERVE_PORT": "9000", "SERVER_SOFTWARE": "gunicorn/27"}, "jobs-9000.sqlite3"),
    ],
)
def test_the_job_file_is_named_after_the_port_that_is_listened_on(
    options: dict[str, Any],
    environ: dict[str, str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two servers on one machine do not want the same file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)
    started = Started(monkeypatch, DLLMSERVE_JOB_STORE="auto", **environ)
    files: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await app.state.jobs.open()
        files.extend(p.name for p in (tmp_path / "dllmserve").glob("*.sqlite3"))
        await app.state.jobs.close()
        yield

    monkeypatch.setattr(app_module, "_lifespan", lifespan)

    async def main() -> None:
        on = LifespanOn(uvicorn.Config(started.app, log_config=None, **options))
        await on.startup()
        await on.shutdown()
        assert not on.should_exit

    asyncio.run(main())
    assert files == [name]


def test_without_a_lifespan_nothing_is_served() -> None:
    async def never(*_: object) -> Message:
        raise AssertionError

    with pytest.raises(EngineError, match="--lifespan off"):
        asyncio.run(app_module._FromEnvironment()({"type": "http"}, never, never))


def told(config: object) -> Receive:
    """The lifespan's ``receive`` of a host with these options."""

    class Lifespan:
        def __init__(self) -> None:
            self.config = config

        async def receive(self) -> Message:
            raise AssertionError

    return Lifespan().receive


def uvicorn_config(monkeypatch: pytest.MonkeyPatch, **options: Any) -> uvicorn.Config:
    """uvicorn's options, those of the environment among them."""
    concurrency = options.pop("WEB_CONCURRENCY", None)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    if concurrency is not None:
        monkeypatch.setenv("WEB_CONCURRENCY", concurrency)
    return uvicorn.Config("x:y", log_config=None, **options)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, False),
        ({"workers": 1}, False),
        ({"workers": 2}, True),
        ({"WEB_CONCURRENCY": "2"}, True),
        ({"workers": 1, "WEB_CONCURRENCY": "4"}, False),
        ({"reload": True, "workers": 4}, False),  # there is one all the same
    ],
)
def test_workers_of_uvicorn(
    options: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    config = uvicorn_config(monkeypatch, **options)
    if refused:
        with pytest.raises(ConfigError, match="one server process"):
            hosts.refuse_several_workers(told(config))
        assert killed == [(os.getppid(), signal.SIGTERM)]
    else:
        hosts.refuse_several_workers(told(config))
        assert killed == []


@pytest.mark.parametrize("count", [1, 4])
def test_workers_of_gunicorn(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker runs uvicorn, and is known there by the method that it is called back by."""

    class Worker:
        cfg = SimpleNamespace(workers=count)

        async def callback_notify(self) -> None:
            raise AssertionError

    # what gunicorn counts, whatever uvicorn would make of the environment
    config = uvicorn_config(
        monkeypatch, callback_notify=Worker().callback_notify, WEB_CONCURRENCY="3"
    )
    assert multiprocessing.parent_process() is None  # it forks
    if count > 1:
        with pytest.raises(ConfigError, match="one server process"):
            hosts.refuse_several_workers(told(config))
    else:
        hosts.refuse_several_workers(told(config))


def test_a_host_that_nobody_knows() -> None:
    async def receive() -> Message:
        raise AssertionError

    hosts.refuse_several_workers(receive)
    hosts.refuse_several_workers(told(object()))
    assert hosts.listening_port(receive) is None
