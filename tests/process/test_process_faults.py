"""Supervision under faults of the system: nobody waits for ever, and nothing is left behind."""

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dllmserve.async_llm import AsyncLLM
from dllmserve.errors import EngineDiedError, EngineError, EngineStartError, TokenizerError
from dllmserve.process import supervisor as supervision
from dllmserve.process import worker
from dllmserve.process.channel import MAX_MESSAGE, Channel, ChannelClosed, Connection
from dllmserve.process.child import is_stopped
from dllmserve.process.messages import Submit
from dllmserve.process.supervisor import State, Supervisor, SupervisorOptions
from dllmserve.sampling_params import SamplingParams
from tests.process.helpers import light
from tests.process.left import children, nothing_left
from tests.process.light_child import POISON


@asynccontextmanager
async def supervised(how: str, directory: Path, **given: Any) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor({}, light(how, directory, **given))
    async with asyncio.timeout(100):
        await supervisor.start()
        try:
            yield supervisor
        finally:
            await supervisor.close()


async def answer(supervisor: Supervisor, *prompt: int) -> list[int]:
    return (await supervisor.submit(Submit([*prompt], SamplingParams())).output()).token_ids


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(supervision, "_LAST_PAUSE_S", 0.01)


@pytest.mark.parametrize("how", ["garbage", "exit"])
def test_engines_that_go_wrong_are_replaced(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with supervised(how, tmp_path) as supervisor:
            good = supervisor.submit(Submit([1, 2], SamplingParams()))
            with pytest.raises(EngineDiedError) as caught:
                await answer(supervisor, POISON)
            part = "no message" if how == "garbage" else "ended with code 0"
            assert part in str(caught.value)
            assert (await good.output()).token_ids == [1, 2]
            assert await answer(supervisor, 3) == [3]
            assert supervisor.restarts == 2

    asyncio.run(main())


def test_an_engine_that_is_stopped_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its silence would be too long."""
    monkeypatch.setattr(worker, "STOPPED_S", 1.0)

    async def main() -> None:
        async with supervised("stops", tmp_path) as supervisor:
            with pytest.raises(EngineDiedError, match=r"stopped for \d+ s, and was killed"):
                await answer(supervisor, POISON)
            assert await answer(supervisor, 3) == [3]

    asyncio.run(main())


@pytest.mark.parametrize("proc", [True, False])
@pytest.mark.parametrize("when", ["starting", "loading", "ranks", "ready"])
def test_an_engine_that_is_stopped_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, proc: bool
) -> None:
    """At any moment, and also where there is no /proc to look at."""
    monkeypatch.setattr(worker, "STOPPED_S", 0.5)
    if not proc:
        monkeypatch.setattr("dllmserve.process.child.process_fields", lambda directory: [])

    async def main() -> None:
        async with supervised(f"stops-{when}", tmp_path) as supervisor:
            assert await answer(supervisor, 3) == [3]
            assert supervisor.restarts == (when == "ready")

    asyncio.run(main())
    assert (tmp_path / "started").exists()


def test_engines_that_are_always_stopped_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "STOPPED_S", 0.1)
    with pytest.raises(EngineStartError, match=r"stopped for \d+ s, and was killed"):
        asyncio.run(Supervisor({}, light("stops-always", tmp_path)).start())


def test_an_engine_that_lets_no_python_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers and large copies hold its lock for seconds; only the watchdog ends that."""
    monkeypatch.setattr(worker, "STOPPED_S", 1.0)

    async def main() -> None:
        async with supervised("holds-lock", tmp_path) as supervisor:
            assert await answer(supervisor, POISON, 2) == [POISON, 2]
            assert supervisor.restarts == 0
        async with supervised("holds-lock", tmp_path, watchdog_s=1.0) as supervisor:
            with pytest.raises(EngineDiedError, match="hung and was killed"):
                await answer(supervisor, POISON, 2)

    asyncio.run(main())


def test_who_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shutil.which("sleep")
    assert path is not None
    # a name that looks like what comes after it, and is no text
    strange = tmp_path / os.fsdecode(b"a) T (b\xff")
    strange.symlink_to(path)
    with subprocess.Popen([strange, "60"]) as process:
        while psutil.Process(process.pid).name() != strange.name:
            time.sleep(0.01)
        for number, stopped in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            process.send_signal(number)
            until = time.monotonic() + 20
            while is_stopped(process.pid) is not stopped and time.monotonic() < until:
                time.sleep(0.01)
            assert is_stopped(process.pid) is stopped
            with monkeypatch.context() as patch:  # where there is no /proc
                patch.setattr("dllmserve.process.child.process_fields", lambda directory: [])
                assert is_stopped(process.pid) is stopped
                assert not is_stopped(1)  # no child of this process
        process.kill()
    assert not is_stopped(process.pid)


def test_no_room_for_a_new_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many processes or open files: it is tried again, and given up in the end."""
    real, failures = subprocess.Popen, iter(range(3))

    def start(*given: Any, **more: Any) -> Any:
        if next(failures, None) is not None:
            raise OSError(24, "Too many open files")
        return real(*given, **more)

    async def main() -> None:
        async with supervised("kill", tmp_path) as supervisor:
            monkeypatch.setattr(subprocess, "Popen", start)
            call = supervisor.submit(Submit([POISON], SamplingParams()))
            with pytest.raises(EngineDiedError):
                await call.output()
            assert await answer(supervisor, 3) == [3]

    asyncio.run(main())
    assert caplog.text.count("Too many open files") == 3


def test_giving_up_says_why_and_fails_everybody(tmp_path: Path) -> None:
    async def main() -> None:
        async with supervised("dies-at-once", tmp_path) as supervisor:
            giving_up = asyncio.create_task(supervisor.failed())
            running = supervisor.submit(Submit([POISON], SamplingParams()))
            with pytest.raises(EngineStartError, match=r"5 times in a row: .* code 3"):
                await running.output()
            assert supervisor.state is State.FAILED
            error = await giving_up
            with pytest.raises(EngineStartError) as caught:
                supervisor.submit(Submit([1], SamplingParams()))
            assert caught.value is error

    asyncio.run(main())


def test_a_fault_of_the_supervision_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with supervised("kill", tmp_path) as supervisor:

            def broken(death: Any) -> bool:
                raise RuntimeError("a fault on purpose")

            monkeypatch.setattr(supervisor, "_judge", broken)
            with pytest.raises(EngineError, match="supervision"):
                await answer(supervisor, POISON)
            assert supervisor.state is State.FAILED
            assert "supervision" in str(await supervisor.failed())

    asyncio.run(main())


def test_starts_that_fail(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(EngineStartError, match="no message"):
            await Supervisor({}, light("garbage-load", tmp_path)).start()
        missing = SupervisorOptions(command=(str(tmp_path / "nothing"),))
        with pytest.raises(EngineStartError, match=r"could not be started: .*No such file"):
            await Supervisor({}, missing).start()

    asyncio.run(main())


def test_closing_while_the_model_is_loaded(tmp_path: Path) -> None:
    before = children()

    async def main() -> None:
        supervisor = Supervisor({}, light("slow-load", tmp_path))
        starting = asyncio.create_task(supervisor.start())
        while children() <= before:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert children() <= before

        # close() beside a start() that succeeds
        supervisor = Supervisor({}, light("none", tmp_path))
        starting = asyncio.create_task(supervisor.start())
        await asyncio.sleep(0)
        await supervisor.close()
        with pytest.raises(EngineError, match="closed"):
            await starting
        assert supervisor.state is State.CLOSED

    asyncio.run(main())


def test_closing_while_an_engine_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with supervised("none", tmp_path) as supervisor:
            assert supervisor.engine_pid is not None
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            while supervisor.state is State.READY:
                await asyncio.sleep(0.001)
            held = supervisor.submit(Submit([1], SamplingParams()))
            await supervisor.close()
            with pytest.raises(EngineError, match="closed"):
                await held.output()
            with pytest.raises(EngineError, match="closed"):
                supervisor.submit(Submit([1], SamplingParams()))
            await supervisor.close()  # again

    asyncio.run(main())


def test_what_an_engine_writes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dllmserve.engine")

    async def main() -> None:
        async with supervised("talks", tmp_path) as supervisor:
            assert await answer(supervisor, POISON, 2) == [POISON, 2]
            while "was here" not in caplog.text:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert "was left out" in caplog.text


def test_a_client_without_its_tokenizer_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")

    async def main() -> None:
        with pytest.raises(TokenizerError):
            async with AsyncLLM("tiny", supervision=light("none", tmp_path)):
                raise AssertionError("it must not start")

    asyncio.run(main())


def test_nobody_else_can_open_the_socket(tmp_path: Path) -> None:
    """It has no name, the processes that a worker starts do not get it, and no port listens."""

    async def main() -> None:
        async with supervised("none", tmp_path) as supervisor:
            engine = psutil.Process(supervisor.engine_pid)
            assert supervisor._engine is not None
            pair = [
                supervisor._engine.socket.getsockname(),
                supervisor._engine.socket.getpeername(),
            ]
            assert pair == ["", ""]
            assert [one.laddr for one in engine.net_connections("unix")] == [""]
            assert not engine.net_connections("inet")

    asyncio.run(main())
    mine, other = socket.socketpair()
    os.set_inheritable(other.fileno(), True)
    with mine:
        channel = Channel.inherited(other.detach())
        assert not channel._socket.get_inheritable()
        channel.close()


def test_both_sides() -> None:
    async def main() -> None:
        mine, other = socket.socketpair()
        child, connection = Channel(other), await Connection.open(mine)
        connection.send(b"a" * 300_000)
        connection.send(b"")
        found = []
        while len(found) < 2:
            await asyncio.sleep(0.001)
            found += child.receive(0)
        assert found == [b"a" * 300_000, b""]
        await asyncio.to_thread(child.send, b"b" * 300_000)
        assert await connection.receive() == b"b" * 300_000
        child.close()
        assert await connection.receive() is None
        connection.close()

    asyncio.run(main())


def test_sides_that_are_out_of_step() -> None:
    mine, other = socket.socketpair()
    channel = Channel(mine)
    with other:
        other.sendall(b"\x00\x00\x00\x03ab")
        assert channel.receive(1) == []
        other.sendall(b"c" + b"\x00\x00\x00\x01d")
        assert channel.receive(1) == [b"abc", b"d"]
        other.sendall((MAX_MESSAGE + 1).to_bytes(4, "big"))
        with pytest.raises(ChannelClosed, match="bytes, over"):
            channel.receive(1)
    with pytest.raises(ChannelClosed, match="closed the socket"):
        channel.receive(1)
    with pytest.raises(ChannelClosed, match="gone"):
        channel.send(b"x")
    channel.close()


def test_a_side_that_reads_no_more() -> None:
    mine, other = socket.socketpair()
    channel = Channel(mine, patience_s=0.1)
    with other, pytest.raises(ChannelClosed, match="timed out"):
        channel.send(bytes(1 << 24))
    channel.close()
