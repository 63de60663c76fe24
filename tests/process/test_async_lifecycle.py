"""AsyncLLM in the wrong event loop, process or moment: it says so at once, and leaves nothing."""

import asyncio
import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dllmserve import AsyncLLM
from dllmserve.errors import ConfigError, EngineError, EngineStartError, RequestAbortedError
from dllmserve.process import fleet
from dllmserve.process.home import Home
from dllmserve.process.supervisor import State, SupervisorOptions
from tests.process.forks import forked
from tests.process.left import children, nothing_left
from tests.process.light_child import POISON

CHILD = Path(__file__).parent / "light_child.py"
PATIENCE_S = 60.0

pytestmark = pytest.mark.timeout(120)
Use = Callable[[AsyncLLM], Coroutine[Any, Any, object]]


Born = Callable[[], set[psutil.Process]]


@pytest.fixture(autouse=True)
def born() -> Iterator[Born]:
    """Processes that the test has started and that still run; at its end there is none."""
    before = children()
    with nothing_left():
        yield lambda: children() - before


def made(directory: Path, how: str = "none", **options: Any) -> AsyncLLM:
    command = (sys.executable, str(CHILD), how, str(directory))
    return AsyncLLM("tiny", supervision=SupervisorOptions(command=command), **options)


def abandon(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop that may hold transports of a process that was killed; they go with it."""
    loop.run_until_complete(asyncio.sleep(0.2))  # most of what is left in it ends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        gc.collect()  # here, not in a later test


def in_new_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """As asyncio.run() in a script, but a hang fails."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


async def answer(llm: AsyncLLM, *prompt: int) -> list[int]:
    ids: list[int] = (await llm.generate(prompt or [1, 2]))["token_ids"]
    return ids


async def _drain(events: Any) -> None:
    async for _ in events:
        pass


async def _check(llm: AsyncLLM) -> None:
    llm.check([1, 2])


USES: dict[str, Use] = {
    "generate": answer,
    "generate text": lambda llm: llm.generate("text"),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "Hi"}]),
    "stream": lambda llm: _drain(llm.stream([1, 2])),
    "stream_text": lambda llm: _drain(llm.stream_text([1, 2])),
    "check": _check,
    "prompt_ids": lambda llm: llm.prompt_ids("text"),
    "chat_ids": lambda llm: llm.chat_ids([{"role": "user", "content": "Hi"}]),
}


def every_use_says(llm: AsyncLLM, part: str) -> None:
    for name, use in USES.items():
        with pytest.raises(EngineError, match=part):
            in_new_loop(use(llm))
            raise AssertionError(f"{name} went through")


@pytest.mark.parametrize("engines", [1, 2])
def test_another_loop(tmp_path: Path, born: Born, engines: int) -> None:
    """The loop that started the engines is over, and so are they."""
    llm = made(tmp_path, data_parallel_size=engines, device="cpu")

    async def first() -> Any:
        await llm.start()
        assert len(born()) == engines
        assert await answer(llm) == [1, 2]
        request = llm.check([POISON])
        return request, llm.submit(request)

    request, call = in_new_loop(first())
    assert not born() and llm.fleet.state is State.CLOSED

    async def submit() -> None:
        llm.submit(request)

    every_use_says(llm, "another event loop, which is over: asyncio.run")
    for use in (submit(), call.output(), llm.start()):
        with pytest.raises(EngineError):
            in_new_loop(use)
    llm.abort(call)
    in_new_loop(llm.close())
    every_use_says(llm, "has been closed: make a new AsyncLLM")
    in_new_loop(llm.close())


def test_start_alone_in_its_loop(tmp_path: Path, born: Born) -> None:
    llm = made(tmp_path)
    in_new_loop(llm.start())
    assert not born()
    every_use_says(llm, "another event loop")
    assert llm.info.limits.max_model_len == 256  # data stays


def test_one_asyncio_run_after_the_other(tmp_path: Path) -> None:
    async def main() -> list[int]:
        async with made(tmp_path) as llm:
            return await answer(llm, 3)

    assert [in_new_loop(main()) for _ in range(2)] == [[3], [3]]


def script(directory: Path, *lines: str, how: str = "none") -> subprocess.CompletedProcess[str]:
    """Run a program of its own, in which ``llm`` is an AsyncLLM that is not started."""
    begin = (
        "import asyncio, sys, psutil",
        "from dllmserve import AsyncLLM",
        "from dllmserve.process.supervisor import SupervisorOptions",
        f"command = (sys.executable, {str(CHILD)!r}, {how!r}, {str(directory)!r})",
        "llm = AsyncLLM('tiny', supervision=SupervisorOptions(command=command))",
        "def children(): return psutil.Process().children()",
    )
    code = "\n".join((*begin, *lines))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_nothing_is_said_on_the_way_out(tmp_path: Path) -> None:
    """A script that forgets to close: no child, no word of asyncio."""
    done = script(
        tmp_path,
        "async def first():",
        "    await llm.start()",
        "    return (await llm.generate([1, 2]))['token_ids']",
        "print(asyncio.run(first()))",
        "try:",
        "    asyncio.run(llm.generate([1]))",
        "except Exception as error:",
        "    print(type(error).__name__)",
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[1, 2]\nEngineError\n", "", 0)


def test_a_loop_that_was_closed_around_its_tasks(tmp_path: Path) -> None:
    """Which asyncio.run() does not do: only then is the engine there until it is closed."""
    done = script(
        tmp_path,
        "loop = asyncio.new_event_loop()",
        "loop.run_until_complete(llm.start())",
        "loop.close()",
        "print(len(children()))",
        "try:",
        "    asyncio.run(llm.generate([1]))",
        "except Exception as error:",
        "    print(error)",
        "asyncio.run(llm.close())",
        "print(all(child.status() == 'zombie' for child in children()))",
    )
    assert done.returncode == 0
    count, error, left = done.stdout.splitlines()
    assert (count, left) == ("1", "True") and "another event loop, which is over" in error


class Residence:
    """An AsyncLLM whose loop runs in a thread of its own."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.do(llm.start())

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE_S)
        self.loop.close()


def test_two_loops_in_two_threads(tmp_path: Path, born: Born) -> None:
    llm = made(tmp_path, "waits")
    home = Residence(llm)
    every_use_says(llm, "another event loop: .*run_coroutine_threadsafe")
    assert home.do(answer(llm)) == [1, 2]

    async def submit(*prompt: int) -> Any:
        return llm.submit(llm.check(prompt))

    # its events cannot be waited for here, but it can be dropped
    call = home.do(submit(POISON))
    with pytest.raises(EngineError, match="another event loop"):
        in_new_loop(call.next())
    llm.abort(call)
    with pytest.raises(RequestAbortedError):
        home.do(call.output())
    waiting = asyncio.run_coroutine_threadsafe(answer(llm, POISON), home.loop)
    in_new_loop(llm.close())
    assert not born()
    with pytest.raises(EngineError, match="has been closed"):
        waiting.result(PATIENCE_S)
    home.end()


def test_closing_when_the_loop_does_not_run(tmp_path: Path, born: Born) -> None:
    llm = made(tmp_path)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(llm.start())
    assert len(born()) == 1
    every_use_says(llm, "another event loop")
    in_new_loop(llm.close())
    assert not born()
    every_use_says(llm, "has been closed")
    abandon(loop)


async def loading(directory: Path, engines: int = 1) -> None:
    """Wait until so many engines load their models."""
    while len([*directory.glob("loading-*")]) < engines:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("engines", [1, 2])
def test_closing_when_the_loop_stopped_while_it_started(
    tmp_path: Path, born: Born, engines: int
) -> None:
    llm = made(tmp_path, "slow-load", data_parallel_size=engines, device="cpu")
    loop = asyncio.new_event_loop()
    starting = loop.create_task(llm.start())
    loop.run_until_complete(asyncio.wait_for(loading(tmp_path, engines), PATIENCE_S))
    assert {p.pid for p in born()} == {*llm.fleet.engine_pids}
    in_new_loop(llm.close())
    assert not born()
    with pytest.raises(EngineError, match="has been closed"):
        loop.run_until_complete(asyncio.wait_for(starting, PATIENCE_S))
    assert not born() and llm.fleet.engine_pids == []
    del starting, llm
    abandon(loop)


def test_closing_before_the_engine_is_known(
    tmp_path: Path, born: Born, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop stopped before it had made the process."""
    real, llm = fleet.shares, made(tmp_path, "slow-load")
    loop = asyncio.new_event_loop()
    reached = asyncio.Event()

    async def late(*given: Any) -> Any:
        reached.set()
        await asyncio.sleep(0.05)
        return await real(*given)

    monkeypatch.setattr(fleet, "shares", late)
    starting = loop.create_task(llm.start())
    loop.run_until_complete(reached.wait())
    in_new_loop(llm.close())
    with pytest.raises(EngineError, match="has been closed"):
        loop.run_until_complete(asyncio.wait_for(starting, PATIENCE_S))
    assert not born()
    del starting, llm
    abandon(loop)


def test_one_that_is_forgotten_while_it_starts(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        "import gc, time, weakref",
        "from pathlib import Path",
        "from tests.process.test_async_lifecycle import loading",
        "loop = asyncio.new_event_loop()",
        "starting = loop.create_task(llm.start())",
        f"loop.run_until_complete(loading(Path({str(tmp_path)!r})))",
        "loop.close()",
        "(engine,) = children()",
        "gone = weakref.ref(llm)",
        "del llm, starting, loop",
        "gc.collect()",
        "print(gone())",
        "engine.wait(60)",
        how="slow-load",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"


def test_a_loop_that_closes_while_another_closes_it(
    tmp_path: Path, born: Born, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ran when it was asked, and is closed when it is called."""
    llm = made(tmp_path)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(llm.start())
    closed, real = asyncio.new_event_loop(), asyncio.run_coroutine_threadsafe
    closed.close()
    monkeypatch.setattr(loop, "is_running", lambda: True)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", lambda work, _: real(work, closed))
    in_new_loop(llm.close())
    monkeypatch.undo()
    assert not born()
    gc.collect()  # a coroutine that nobody has awaited complains now
    abandon(loop)


def test_a_loop_that_ends_while_another_closes_it(
    tmp_path: Path, born: Born, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.run() cancels the closing, as all that runs there."""
    llm = made(tmp_path)
    home = Residence(llm)

    async def cancelled() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(llm, "_close", cancelled)
    in_new_loop(llm.close())
    assert not born()
    home.end()


def test_moments(tmp_path: Path, born: Born) -> None:
    """Before start, twice, after close, closed before start."""
    every_use_says(made(tmp_path), r"not been started: await start\(\)")
    with pytest.raises(EngineError, match=r"await start\(\)"):
        made(tmp_path).info  # noqa: B018

    async def main() -> None:
        llm = made(tmp_path)
        both = await asyncio.gather(llm.start(), llm.start(), return_exceptions=True)
        assert isinstance(both[1], EngineError) and "already" in str(both[1])
        with pytest.raises(EngineError, match="already"):
            await llm.start()
        with pytest.raises(EngineError, match="already"):
            async with llm:
                raise AssertionError("it was started before")
        assert await answer(llm) == [1, 2]
        await asyncio.gather(llm.close(), llm.close(), llm.close())
        assert not born()
        await llm.close()
        with pytest.raises(EngineError, match="closed: make a new"):
            await llm.start()

        never = made(tmp_path)
        await never.close()
        await never.close()
        with pytest.raises(EngineError, match="closed: make a new"):
            await never.start()

    in_new_loop(main())


def test_a_start_that_fails(tmp_path: Path) -> None:
    async def main() -> None:
        llm = made(tmp_path, "garbage-load")
        with pytest.raises(EngineStartError, match="no message"):
            await llm.start()
        for use in (answer(llm), llm.start()):
            with pytest.raises(
                EngineError, match=r"start\(\) has failed \(.*no message.*make a new"
            ):
                await use
        await llm.close()
        with pytest.raises(EngineError, match="has failed"):
            await answer(llm)

    in_new_loop(main())


@pytest.mark.parametrize("engines", [1, 2])
def test_closing_while_it_starts(tmp_path: Path, born: Born, engines: int) -> None:
    async def main() -> None:
        llm = made(tmp_path, "slow-load", data_parallel_size=engines, device="cpu")
        starting = asyncio.create_task(llm.start())
        while len(born()) < engines:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="still being started"):
            await answer(llm)
        await llm.close()
        assert not born()
        with pytest.raises(EngineError, match="closed while it was being started"):
            await starting

        llm = made(tmp_path, "slow-load")
        starting = asyncio.create_task(llm.start())
        await asyncio.sleep(0.05)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not born()
        with pytest.raises(EngineError, match="was cancelled"):
            await answer(llm)

    in_new_loop(main())


def test_one_that_is_forgotten_takes_its_engine_with_it(tmp_path: Path, born: Born) -> None:
    async def main() -> None:
        llm = made(tmp_path)
        await llm.start()
        assert await answer(llm) == [1, 2]
        (engine,) = born()
        with pytest.warns(ResourceWarning, match="not closed"):
            del llm
            gc.collect()
        while engine.is_running() and engine.status() != "zombie":
            await asyncio.sleep(0.01)

    in_new_loop(main())


def test_a_forked_process(tmp_path: Path) -> None:
    """It is told so, cannot end the parent's engine, and may have one of its own."""

    async def own() -> list[int]:
        async with made(tmp_path) as llm:
            return await answer(llm, 5)

    async def main() -> None:
        not_started = made(tmp_path)
        async with made(tmp_path) as llm:

            def child() -> str:
                every_use_says(llm, "forked from it: make a new AsyncLLM in this process")
                with pytest.raises(EngineError, match="forked"):
                    in_new_loop(llm.start())
                in_new_loop(llm.close())
                assert in_new_loop(not_started.start()).spec == llm.info.spec
                return str(in_new_loop(own()))

            said = await asyncio.to_thread(forked, child)
            assert said == "[5]"
            assert await answer(llm) == [1, 2]

    in_new_loop(main())


def test_wrong_options_are_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        made(tmp_path, data_parallel_size=0)


def test_home() -> None:
    async def main() -> Home:
        home = Home()
        home.check()
        assert home.here and not home.forked
        await asyncio.to_thread(lambda: None)
        return home

    home = in_new_loop(main())
    assert not home.here
    with pytest.raises(EngineError, match="which is over"):
        home.check()
    home.call(lambda: None)  # nobody is there, and that is all right
