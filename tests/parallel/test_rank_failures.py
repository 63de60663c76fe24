"""Ranks that die, stop, fail or are told to leave."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.errors import ConfigError, EngineError, RankError
from dllmserve.process import ranks, worker
from dllmserve.process.ranks import Ranks
from tests.process.left import nothing_left

ROOT = Path(__file__).parent.parent.parent
LONG = SamplingParams(temperature=0.0, gen_length=200, steps=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, gen_length=8, steps=2)


def two_ranks() -> LLM:
    return LLM("tiny", device="cpu", max_model_len=256, tensor_parallel_size=2)


def ranks_of(llm: LLM) -> Ranks:
    found: Ranks = llm._engine._runner.ranks  # type: ignore[attr-defined]
    return found


def after_steps(llm: LLM, count: int, act: Callable[[], object]) -> None:
    """Do something when so many steps have been launched."""
    left = [count]

    def note(plan: StepPlan) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    llm._engine.observers.append(note)


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "died of SIGKILL"), (signal.SIGSTOP, "stopped for")]
)
def test_a_rank_that_dies_or_stops(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    monkeypatch.setattr(worker, "STOPPED_S", 2.0)
    with nothing_left():
        llm = two_ranks()
        (pid,) = ranks_of(llm).pids
        after_steps(llm, 5, lambda: os.kill(pid, number))
        with pytest.raises(RankError, match=said) as error:
            llm.generate(["one", "two"], LONG, use_tqdm=False)
        assert error.value.killed and "rank 1" in str(error.value)
        while psutil.pid_exists(pid):
            time.sleep(0.01)
        with pytest.raises(RankError, match=said):  # and so it stays
            llm.generate(["one"], SHORT, use_tqdm=False)
        llm.close()


def test_a_rank_that_is_stopped_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
    monkeypatch.setattr(worker, "STOPPED_S", 0.5)
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", code))
    with nothing_left(), pytest.raises(RankError, match=r"rank 1 has been stopped for") as error:
        two_ranks()
    assert error.value.stopped and error.value.killed


def test_a_rank_that_lets_no_python_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives no sign of life and is healthy; one that is silent for much longer is not."""
    code = (
        "import ctypes, signal\nfrom dllmserve.engine import worker\n"
        "from dllmserve.runtime.runner import ModelRunner\n"
        "follow = ModelRunner.follow\n"
        "def slow(self, plan):\n"
        # the signal that asks for stacks would end the sleep
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "    ctypes.PyDLL(None).sleep(3)\n"
        "    follow(self, plan)\n"
        "ModelRunner.follow = slow\n"
        "worker.main()"
    )
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(worker, "STOPPED_S", 1.0)
    one = SamplingParams(temperature=0.0, gen_length=8, steps=1)
    with nothing_left(), two_ranks() as llm:
        assert llm.generate(["one"], one, use_tqdm=False)[0]["token_ids"]
        monkeypatch.setattr(worker, "STACKS_S", 0.1)
        assert ranks_of(llm)._workers[0].silence_s == ranks.SILENCE_S
        ranks_of(llm)._workers[0].silence_s = 1.0
        with pytest.raises(RankError, match=r"rank 1 was silent for \d+ s: it hung"):
            llm.generate(["one"], one, use_tqdm=False)


def test_a_rank_that_dies_between_two_calls() -> None:
    with nothing_left(), two_ranks() as llm:
        llm.generate(["one"], SHORT, use_tqdm=False)
        (pid,) = ranks_of(llm).pids
        os.kill(pid, signal.SIGKILL)
        while ranks_of(llm).failure is None:
            time.sleep(0.01)
        with pytest.raises(RankError, match="SIGKILL"):
            llm.generate(["one"], SHORT, use_tqdm=False)


def test_an_error_on_rank_0_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_HEAR_S", 0.2)
    with nothing_left():
        llm = two_ranks()

        def broken(plan: StepPlan) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(llm._engine._runner._runner, "execute", broken)  # type: ignore[attr-defined]
        with pytest.raises(RankError, match="rank 0 failed: RuntimeError: DefaultCPUAllocator"):
            llm.generate(["one"], SHORT, use_tqdm=False)
        llm.close()


def test_a_handler_that_leaves_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leaves it in its middle, the next call says so and does not hang."""
    with nothing_left(), two_ranks() as llm:

        def left(plan: StepPlan) -> None:
            raise SystemExit(3)

        monkeypatch.setattr(llm._engine._runner._runner, "execute", left)  # type: ignore[attr-defined]
        with pytest.raises(SystemExit):
            llm.generate(["one"], SHORT, use_tqdm=False)
        with pytest.raises(RankError, match="rank 0 failed: SystemExit"):
            llm.generate(["one"], SHORT, use_tqdm=False)


def test_autocast_outside_changes_nothing() -> None:
    with nothing_left(), two_ranks() as llm:
        plain = llm.generate(["one"], SHORT, use_tqdm=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert llm.generate(["one"], SHORT, use_tqdm=False) == plain


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with nothing_left():
        one, other = two_ranks(), two_ranks()
        one.close()
        other.close()
    assert torch.get_num_threads() == before


def test_a_rank_dies_while_the_others_meet_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has started, and does not come to the group."""
    code = (
        "import os, sys, time\nfrom dllmserve.process.channel import Channel\n"
        "from dllmserve.process.messages import Reached, encode\n"
        "Channel.inherited(int(sys.argv[1])).send(encode(Reached('started'))); time.sleep(1); "
        "os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", code))
    with nothing_left(), pytest.raises(RankError, match="rank 1 died of SIGKILL"):
        two_ranks()


def test_closing() -> None:
    with nothing_left():
        llm = two_ranks()
        threads = threading.active_count()
        with llm:
            answers = llm.generate(["one"], SHORT, use_tqdm=False)
        assert answers[0]["token_ids"]
        llm.close()
        with pytest.raises(EngineError, match="has been closed"):
            llm.generate(["one"], SHORT, use_tqdm=False)
        assert threading.active_count() < threads


def test_two_engines_side_by_side() -> None:
    """In one process, with groups, stores and connections of their own."""
    with nothing_left(), two_ranks() as one, two_ranks() as other:
        answers = [None, None]

        def run(place: int, llm: LLM) -> None:
            answers[place] = llm.generate(["a", "b"], SHORT, use_tqdm=False)  # type: ignore[call-overload]

        threads = [
            threading.Thread(target=run, args=(place, llm))
            for place, llm in enumerate((one, other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[0] == answers[1] is not None


def test_a_rank_that_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('no such luck')"
    monkeypatch.setattr(ranks, "COMMAND", (sys.executable, "-c", code))
    with nothing_left(), pytest.raises(RankError, match="rank 1 ended with code 1"):
        two_ranks()


def test_no_program_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "COMMAND", ("/does/not/exist",))
    with nothing_left(), pytest.raises(RankError, match=r"could not be started: .*No such file"):
        two_ranks()


PROGRAM = """
import os, signal, sys
from dllmserve import LLM, SamplingParams
llm = LLM("tiny", device="cpu", tensor_parallel_size=2)
print(*llm._engine._runner.ranks.pids, flush=True)
params = SamplingParams(temperature=0.0, gen_length=400, steps=400, ignore_eos=True)
try:
    while True:
        llm.generate(["one"], params, use_tqdm=False)
        print("again", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
short = SamplingParams(temperature=0.0, gen_length=8, steps=2)
print(len(llm.generate(["one"], short, use_tqdm=False)), flush=True)
"""


def start(*command: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        # a suite that was started in the background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_rank_0_dies() -> None:
    process = start("-c", PROGRAM)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.kill()
    process.wait()
    while not gone(pid):
        time.sleep(0.01)
    process.stdout.close()


def test_ctrl_c_leaves_the_engine_usable() -> None:
    """It waits for the end of the step, so that the ranks stay in step."""
    process = start("-c", PROGRAM)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.5)
    # like a terminal, which asks every process of the group
    os.killpg(process.pid, signal.SIGINT)
    written, _ = process.communicate(timeout=60)
    lines = [line for line in written.split("\n") if line and line != "again"]
    assert lines == ["interrupted", "1"]
    assert process.returncode == 0
    assert gone(pid)


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its processes would start all ranks; with one rank each has an engine of its own."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with nothing_left():
        with pytest.raises(ConfigError, match=r"this is rank 1 of 2 .* without torchrun"):
            two_ranks()
        with LLM("tiny", device="cpu", max_model_len=256) as llm:
            assert llm.generate(["one"], SHORT, use_tqdm=False)[0]["token_ids"]
