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
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Scope
from uvicorn.lifespan.on import LifespanOn

from dllmserve.errors import ConfigError, EngineError, ModelNotFoundError
from dllmserve.server import app as app_module
from dllmserve.server import workers

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

        monkeypatch.setattr(app_module, "lifespan", lifespan)
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

    monkeypatch.setattr(app_module, "lifespan", lifespan)
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
    monkeypatch.setattr(workers, "_command", lambda pid: [])
    started = Started(monkeypatch, DLLMSERVE_JOB_STORE="auto", **environ)
    files: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await app.state.jobs.open()
        files.extend(p.name for p in (tmp_path / "dllmserve").glob("*.sqlite3"))
        await app.state.jobs.close()
        yield

    monkeypatch.setattr(app_module, "lifespan", lifespan)

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


def fake_processes(root: Path, parent: str, children: list[str]) -> Path:
    """A /proc with our parent and its children, by their command lines."""
    own = os.getppid()
    numbers = [own, *(own + 1000 + n for n in range(len(children)))]
    for number, command in zip(numbers, [parent, *children], strict=True):
        above = 1 if number == own else own
        (root / str(number)).mkdir()
        (root / str(number) / "stat").write_text(f"{number} (a) b) S {above} 1 1")
        (root / str(number) / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (root / str(own + 1)).mkdir()  # one that is gone
    (root / "self").mkdir()
    return root


SPAWNED = "python -c code --multiprocessing-fork"


@pytest.mark.parametrize(
    ("parent", "children", "environ", "refused"),
    [
        ("uvicorn app --reload", [SPAWNED], {}, False),
        ("uvicorn app --reload", [SPAWNED], {"WEB_CONCURRENCY": "4"}, False),
        ("uvicorn app --workers 1", [SPAWNED, "python -c tracker"], {}, False),
        ("uvicorn app --workers 2", [SPAWNED, SPAWNED], {}, True),
        ("uvicorn app --workers 2", [SPAWNED], {}, True),  # the other one was refused before
        ("uvicorn app", [SPAWNED], {"WEB_CONCURRENCY": "2"}, True),
        ("uvicorn app", [SPAWNED], {"UVICORN_WORKERS": "2"}, True),
        ("python run.py", [SPAWNED, SPAWNED], {}, True),  # uvicorn.run(..., workers=2)
    ],
)
def test_workers_of_uvicorn(
    parent: str,
    children: list[str],
    environ: dict[str, str],
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WEB_CONCURRENCY", "UVICORN_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(workers, "_PROC", fake_processes(tmp_path, parent, children))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    if refused:
        with pytest.raises(ConfigError, match="one server process"):
            workers.refuse_several_workers()
        assert killed == [(os.getppid(), signal.SIGTERM)]
    else:
        workers.refuse_several_workers()
        assert killed == []


@pytest.mark.parametrize(
    ("command", "environ", "refused"),
    [
        ("gunicorn -w 4 app", {}, True),
        ("gunicorn -w4 app", {}, True),
        ("gunicorn --workers 4 app", {}, True),
        ("gunicorn app --workers=4", {}, True),
        ("gunicorn app -w", {}, False),
        ("gunicorn -w 1 app", {"WEB_CONCURRENCY": "4"}, False),
        ("gunicorn app", {"WEB_CONCURRENCY": "4"}, True),
        ("gunicorn app", {"GUNICORN_CMD_ARGS": "--workers '2'"}, True),
        ("gunicorn app -k worker", {}, False),
    ],
)
def test_workers_of_gunicorn(
    command: str, environ: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEB_CONCURRENCY", "GUNICORN_CMD_ARGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SERVER_SOFTWARE": "gunicorn/27", **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "_command", lambda pid: command.split())
    if refused:
        with pytest.raises(ConfigError, match="one server process"):
            workers.refuse_several_workers()
    else:
        workers.refuse_several_workers()
    # the same words mean nothing under another server
    monkeypatch.delenv("SERVER_SOFTWARE")
    workers.refuse_several_workers()


def test_one_process_may_say_what_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """WEB_CONCURRENCY alone does not make workers."""
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)
    assert multiprocessing.parent_process() is None
    workers.refuse_several_workers()
