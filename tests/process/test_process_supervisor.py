"""The engine process: answers, aborts, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dllmserve import LLM, SamplingParams, SparseConfig
from dllmserve._settings import with_sparse
from dllmserve.errors import (
    EngineDiedError,
    EngineStartError,
    ModelNotFoundError,
    OutOfMemoryError,
    RequestAbortedError,
)
from dllmserve.process.calls import MAX_KILLS_ALONE, Call, Delta
from dllmserve.process.messages import Submit
from dllmserve.process.supervisor import State, Supervisor, SupervisorOptions
from tests.process.faulty_child import POISON
from tests.process.helpers import until
from tests.process.left import nothing_left

CHILD = Path(__file__).parent / "faulty_child.py"
GREEDY = SamplingParams(temperature=0.0, gen_length=16, steps=16, block_length=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, gen_length=96, steps=96, ignore_eos=True)


def options(path: Path) -> dict[str, Any]:
    return {"model": str(path), "device": "cpu"}


def faulty(how: str, **given: Any) -> SupervisorOptions:
    return SupervisorOptions(command=(sys.executable, str(CHILD), how), **given)


def with_engine(
    path: Path, how: SupervisorOptions, body: Callable[[Supervisor], Awaitable[None]]
) -> None:
    async def main() -> None:
        supervisor = Supervisor(options(path), how)
        await supervisor.start()
        try:
            async with asyncio.timeout(120):
                await body(supervisor)
        finally:
            await supervisor.close()

    with nothing_left():
        asyncio.run(main())


def ask(
    supervisor: Supervisor,
    prompt: list[int],
    params: SamplingParams = GREEDY,
    sparse: SparseConfig | None = None,
    **how: Any,
) -> Call:
    return supervisor.submit(Submit(prompt, with_sparse(params, sparse), **how))


def test_answers_equal_those_of_llm(byte_checkpoint: Path, engines: Any) -> None:
    """All kinds of parameters survive the socket."""
    llm: LLM = engines(byte_checkpoint)
    ways = [
        (GREEDY, None),
        (SamplingParams(gen_length=16, steps=8, seed=3, top_p=0.9, top_k=5), None),
        (SamplingParams(temperature=0.0, gen_length=12, stop=["a", "bc"], cfg_scale=1.5), None),
        (SamplingParams(temperature=0.0, gen_length=12, logit_bias={5: 100.0}), None),
        (
            SamplingParams(temperature=0.0, gen_length=24, unmask="threshold", threshold=0.2),
            SparseConfig(retention_ratio=0.3, default_block_len=8),
        ),
    ]

    async def body(supervisor: Supervisor) -> None:
        calls = [ask(supervisor, [65, 66], params, sparse) for params, sparse in ways]
        for call, (params, sparse) in zip(calls, ways, strict=True):
            alone = llm.generate([[65, 66]], params, sparse, use_tqdm=False)[0]
            assert (await call.output()).as_dict() == alone

    with_engine(byte_checkpoint, faulty("none"), body)


def test_streams_give_every_id_once_and_in_order(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        call = ask(supervisor, [65], stream=True)
        ids: list[int] = []
        while isinstance(event := await call.next(), Delta) or not hasattr(event, "token_ids"):
            if isinstance(event, Delta):
                ids += event.token_ids
        assert not isinstance(event, Delta) and hasattr(event, "text")
        assert event.token_ids[: len(ids)] == ids and len(ids) > 0

    with_engine(byte_checkpoint, faulty("none"), body)


def test_aborted_requests_free_everything(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        calls = [ask(supervisor, [65, n + 1], LONG) for n in range(100)]
        await until(lambda: any(c.running for c in calls))
        for call in calls:
            supervisor.abort(call)
        with pytest.raises(RequestAbortedError):
            await calls[0].output()
        await until(lambda: supervisor.counters.running == supervisor.counters.waiting == 0)
        assert supervisor.counters.pages_used == 0
        assert len((await ask(supervisor, [65]).output()).token_ids) == 16

    with_engine(byte_checkpoint, faulty("none"), body)


def test_killed_engines_lose_no_request(byte_checkpoint: Path, engines: Any) -> None:
    """Kills from outside, at random moments: every answer is that of an undisturbed run."""
    llm: LLM = engines(byte_checkpoint)
    prompts = [[65 + n, 80] for n in range(12)]
    expected = llm.generate(prompts, LONG, use_tqdm=False)

    async def body(supervisor: Supervisor) -> None:
        calls = [ask(supervisor, prompt, LONG) for prompt in prompts]
        for _ in range(2):
            await until(lambda: supervisor.state is State.READY and any(c.running for c in calls))
            assert supervisor.engine_pid is not None
            os.kill(supervisor.engine_pid, signal.SIGKILL)
            await until(lambda: supervisor.state is State.RESTARTING)
        outputs = [(await call.output()).as_dict() for call in calls]
        assert outputs == expected
        assert supervisor.restarts == 2

    with_engine(byte_checkpoint, faulty("none"), body)


# chaos has signals
@pytest.mark.parametrize("how", ["raise", "hang"])
def test_a_request_that_kills_the_engine_twice_fails_alone(byte_checkpoint: Path, how: str) -> None:
    async def body(supervisor: Supervisor) -> None:
        good = [ask(supervisor, [65, n + 1], LONG) for n in range(3)]
        bad = ask(supervisor, [POISON, 1], LONG)
        late = [ask(supervisor, [66, n + 1], LONG) for n in range(3)]
        with pytest.raises(EngineDiedError):
            await bad.output()
        for call in (*good, *late):
            assert len((await call.output()).token_ids) == 96
        assert supervisor.restarts == 2

    with_engine(byte_checkpoint, faulty(how, watchdog_s=2.0), body)


def test_killed_alone_again_and_again_fails(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        bad = ask(supervisor, [POISON], LONG)
        with pytest.raises(EngineDiedError):
            await bad.output()
        assert supervisor.restarts <= MAX_KILLS_ALONE
        assert (await ask(supervisor, [65]).output()).token_ids

    with_engine(byte_checkpoint, faulty("SIGKILL"), body)


def test_a_begun_stream_ends_with_an_error(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        params = SamplingParams(temperature=0.0, gen_length=96, steps=96, block_length=1)
        call = ask(supervisor, [65], params, stream=True)
        while not isinstance(await call.next(), Delta):
            pass
        assert supervisor.engine_pid is not None
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match="SIGKILL"):
            await call.output()

    with_engine(byte_checkpoint, faulty("none"), body)


def test_memory_errors_end_one_request(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        bad, good = ask(supervisor, [POISON]), ask(supervisor, [65])
        with pytest.raises(OutOfMemoryError):
            await bad.output()
        assert len((await good.output()).token_ids) == 16
        assert supervisor.restarts == 0

    with_engine(byte_checkpoint, faulty("oom"), body)


def test_without_restarts_the_supervisor_gives_up(byte_checkpoint: Path) -> None:
    async def body(supervisor: Supervisor) -> None:
        call = ask(supervisor, [POISON], LONG)
        with pytest.raises(EngineDiedError, match="restarts are off"):
            await call.output()
        assert supervisor.state is State.FAILED
        with pytest.raises(EngineDiedError):
            ask(supervisor, [65])

    with_engine(byte_checkpoint, faulty("SIGKILL", restart=False), body)


def test_the_engine_dies_with_its_owner(byte_checkpoint: Path) -> None:
    """Even in the middle of a step that never ends."""
    script = (
        "import asyncio, sys\n"
        "from dllmserve.process.messages import Submit\n"
        "from dllmserve.process.supervisor import *\n"
        "from dllmserve import SamplingParams as P\n"
        "async def main():\n"
        f"    how = SupervisorOptions(command=(sys.executable, {str(CHILD)!r}, 'hang'))\n"
        f"    s = Supervisor({options(byte_checkpoint)!r}, how)\n"
        "    await s.start()\n"
        f"    s.submit(Submit([{POISON}], P()))\n"
        "    print(s.engine_pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )

    async def main() -> None:
        owner = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
        )
        assert owner.stdout is not None
        engine = psutil.Process(int(await owner.stdout.readline()))
        owner.kill()
        await owner.wait()
        await until(lambda: not engine.is_running() or engine.status() == "zombie", 10)

    asyncio.run(main())


def test_bad_models_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ModelNotFoundError, match="nowhere"):
            await Supervisor(options(tmp_path / "nowhere"), SupervisorOptions()).start()
        how = SupervisorOptions(command=(sys.executable, "-c", "import sys; sys.exit(3)"))
        with pytest.raises(EngineStartError, match="ended with code 3"):
            await Supervisor(options(tmp_path), how).start()
        how = SupervisorOptions(
            command=(sys.executable, "-c", "import time; time.sleep(60)"), load_timeout_s=0.5
        )
        started = time.monotonic()
        with pytest.raises(EngineStartError, match=r"not ready after 0\.5 s"):
            await Supervisor(options(tmp_path), how).start()
        assert time.monotonic() - started < 40

    with nothing_left():
        asyncio.run(main())
