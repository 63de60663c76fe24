"""LLM: closing, forks, callbacks, interrupts, threads. It says what is wrong; nobody waits."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dllmserve.engine.shared as shared
import dllmserve.llm as llm_module
from dllmserve import LLM, SamplingParams
from dllmserve._system import inherited
from dllmserve.core.plan import StepPlan
from dllmserve.engine.start import build_engine
from dllmserve.errors import EngineError
from tests.conftest import Engines
from tests.helpers import check_idle
from tests.process.forks import forked
from tests.process.left import nothing_left

SHORT = SamplingParams(temperature=0.0, gen_length=8, steps=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, gen_length=200, steps=200, ignore_eos=True)
USER = [{"role": "user", "content": "Hi"}]
PATIENCE_S = 60.0

pytestmark = pytest.mark.timeout(120)


def made(path: Path, **options: Any) -> LLM:
    return LLM(str(path), device="cpu", **options)


@pytest.fixture
def llm(byte_checkpoint: Path) -> LLM:
    """One that the test may close."""
    return made(byte_checkpoint)


USES: dict[str, Callable[[LLM], object]] = {
    "generate": lambda llm: llm.generate(["Hi"], SHORT, use_tqdm=False),
    "generate nothing": lambda llm: llm.generate([], use_tqdm=False),
    "chat": lambda llm: llm.chat(USER, SHORT, use_tqdm=False),
    "stream": lambda llm: llm.stream("Hi", SHORT),
    "chat_ids": lambda llm: llm.chat_ids(USER),
    "observe": lambda llm: llm.observe(lambda plan: None).__enter__(),
}


def every_use_says(llm: LLM, part: str) -> None:
    for name, use in USES.items():
        with pytest.raises(EngineError, match=part):
            use(llm)
            raise AssertionError(f"{name} went through")


class Thread:
    """A thread whose result, or error, is waited for with patience."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.result: object = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def join(self) -> "Thread":
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it waits for ever"
        return self


def after_steps(count: int, act: Callable[[], object]) -> Callable[[StepPlan], None]:
    left = [count]

    def note(plan: StepPlan) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return note


def test_closing_with_an_open_stream(llm: LLM) -> None:
    read_on, closed_later, collected_later, untouched = (llm.stream("Hi", LONG) for _ in range(4))
    for stream in (read_on, closed_later, collected_later):
        next(stream)
    llm.close()
    for stream in (read_on, untouched):
        with pytest.raises(EngineError, match="has been closed"):
            next(stream)
        assert list(stream) == []
    closed_later.close()  # type: ignore[attr-defined]
    del collected_later
    gc.collect()
    llm.close()
    every_use_says(llm, "has been closed: load the model again")
    assert llm.tokenizer is not None and llm.spec.vocab_size == 260  # data stays


def test_leaving_the_block_with_an_open_stream(byte_checkpoint: Path) -> None:
    with made(byte_checkpoint) as llm:
        stream = llm.stream("Hi", LONG)
        next(stream)
    with pytest.raises(EngineError, match="has been closed"):
        next(stream)


def test_what_was_complete_before_closing_can_be_read(llm: LLM) -> None:
    stream = llm.stream("Hi", SamplingParams(temperature=0.0, gen_length=4, steps=1))
    last = next(stream)
    llm.close()
    assert last.output is not None and list(stream) == []


def test_closing_while_threads_wait(llm: LLM) -> None:
    works: list[Callable[[], object]] = [
        lambda: llm.generate(["one"] * 3, LONG, use_tqdm=False),
        lambda: llm.chat(USER, LONG, use_tqdm=False),
        lambda: list(llm.stream("two", LONG)),
        lambda: llm.generate(["three"], LONG, use_tqdm=True),
    ]
    running, goes_on = threading.Event(), threading.Event()
    with llm.observe(after_steps(5, lambda: (running.set(), goes_on.wait(PATIENCE_S)))):
        threads = [Thread(work) for work in works]
        running.wait(PATIENCE_S)  # one of them is inside a step, the others wait for it
        closing = [Thread(llm.close), Thread(llm.close)]
        goes_on.set()
        for thread in closing:
            assert thread.join().error is None
        for thread in threads:
            error = thread.join().error
            assert type(error) is EngineError and "has been closed" in str(error)
            assert error.__cause__ is None
    every_use_says(llm, "has been closed")


def test_closing_from_a_callback(llm: LLM) -> None:
    """The step ends, and with it the engine."""
    closed: list[str] = []
    real = llm._engine.close
    llm._engine.close = lambda: (closed.append("closed"), real())[1]  # type: ignore[method-assign]
    waiting: list[Thread] = []

    def act() -> None:
        waiting.append(Thread(lambda: list(llm.stream("two", LONG))))
        llm.close()
        assert not closed

    with llm.observe(after_steps(3, act)):
        with pytest.raises(EngineError, match="has been closed"):
            llm.generate(["one"], LONG, use_tqdm=False)
    assert isinstance(waiting[0].join().error, EngineError)
    every_use_says(llm, "has been closed")


def test_generating_inside_a_step(llm: LLM) -> None:
    """A callback runs in the middle of it; whatever it tries is refused, and can be caught."""
    said: list[str] = []

    def act() -> None:
        for use in (
            lambda: llm.generate(["one"], SHORT, use_tqdm=False),
            lambda: llm.chat(USER, SHORT, use_tqdm=False),
            lambda: list(llm.stream("one", SHORT)),
        ):
            with pytest.raises(EngineError) as caught:
                use()
            said.append(str(caught.value))

    expected = llm.generate(["Hi"], SHORT, use_tqdm=False)
    with llm.observe(after_steps(2, act)):
        assert llm.generate(["Hi"], SHORT, use_tqdm=False) == expected
    assert len(said) == 3 and all("callback of observe()" in text for text in said)
    check_idle(llm)


def test_an_error_in_a_callback(llm: LLM) -> None:
    """It comes out of the call whose thread runs the step; the engine goes on."""
    expected = llm.generate(["Hi"], SHORT, use_tqdm=False)

    def fail() -> None:
        raise ZeroDivisionError("in a callback")

    other = llm.stream("two", LONG)
    next(other)
    with llm.observe(after_steps(3, fail)), pytest.raises(ZeroDivisionError):
        llm.generate(["Hi"], SHORT, use_tqdm=False)
    with pytest.raises(EngineError, match=r"step failed: ZeroDivisionError\('in a callback'\)"):
        next(other)
    check_idle(llm)
    assert llm.generate(["Hi"], SHORT, use_tqdm=False) == expected


def test_a_callback_that_leaves_inside_its_own_call(llm: LLM) -> None:
    seen: list[int] = []
    first = llm.observe(lambda plan: first.__exit__(None, None, None))
    first.__enter__()
    with llm.observe(lambda plan: seen.append(plan.tokens)):
        llm.generate(["Hi"], SHORT, use_tqdm=False)
    assert len(seen) == 8


def test_generating_between_the_steps_of_a_stream(llm: LLM) -> None:
    expected = llm.generate(["Hi"], SHORT, use_tqdm=False)
    last = None
    for step in llm.stream("Hi", SHORT):
        last = step.output
        assert llm.generate(["Hi"], SHORT, use_tqdm=False) == expected
        inner = list(llm.stream("Hi", SHORT))[-1].output
        assert inner is not None and inner.as_dict() == expected[0]
    assert last is not None and last.as_dict() == expected[0]
    check_idle(llm)


def test_interrupts_at_any_moment(llm: LLM) -> None:
    """Ctrl-C ends this thread's call, and at worst the step of the others; then all goes on."""
    expected = llm.generate(["Hi"], SHORT, use_tqdm=False)
    main = threading.main_thread().ident
    assert main is not None

    def interrupted(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, interrupted)
    try:
        for place in range(6):
            other = Thread(partial(llm.generate, ["other"], LONG, use_tqdm=False))
            timer = threading.Timer(
                0.003 * place, lambda: signal.pthread_kill(main, signal.SIGUSR2)
            )
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                while True:
                    llm.generate(["Hi"] * 2, SHORT, use_tqdm=False)
            timer.join()
            assert llm.generate(["Hi"], SHORT, use_tqdm=False) == expected
            error = other.join().error
            assert error is None or "KeyboardInterrupt" in str(error)
    finally:
        signal.signal(signal.SIGUSR2, before)
    check_idle(llm)


def test_a_short_call_beside_a_long_one(llm: LLM) -> None:
    """Whose answer is complete does not wait for the thread that steps."""
    steps: list[int] = []
    reached: dict[str, int] = {}

    def work(name: str, params: SamplingParams) -> None:
        llm.generate([name], params, use_tqdm=False)
        reached[name] = len(steps)

    joined: list[Thread] = []
    start = after_steps(3, lambda: joined.append(Thread(lambda: work("short", SHORT))))
    with llm.observe(lambda plan: steps.append(1)), llm.observe(start):
        long = Thread(lambda: work("long", LONG))
        long.join()
        joined[0].join()
    assert reached["short"] < reached["long"] == 200


def operations(work: Callable[[], object]) -> int:
    """Bytecodes that llm.py and shared.py execute meanwhile."""
    files = {llm_module.__file__, shared.__file__}
    count = 0

    def trace(frame: FrameType, event: str, value: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_the_host_work_of_a_prompt_does_not_grow_with_their_number(
    engines: Engines, byte_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four times the prompts are four times the work, with and without a progress bar."""
    llm = engines(byte_checkpoint, max_num_seqs=4)
    one = SamplingParams(temperature=0.0, gen_length=1, steps=1)
    for bar in (False, True):
        run = partial(llm.generate, sampling_params=one, use_tqdm=bar)
        few, many = (operations(partial(run, [[1, 2]] * count)) for count in (50, 200))
        assert many < 4.5 * few


def test_the_progress_bar_in_a_file(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture at the beginning and one at the end, with what was done."""
    llm.generate(["Hi"] * 3, LONG)
    pictures = capsys.readouterr().err.split("\r")
    assert len([picture for picture in pictures if picture.strip()]) <= 3
    assert "3/3" in pictures[-1] and "200 forwards" in pictures[-1] and "tokens/s" in pictures[-1]


def test_a_forked_process(llm: LLM) -> None:
    expected = llm.generate(["Hi"], SHORT, use_tqdm=False)
    carried = llm.stream("Hi", SHORT)
    first = next(carried)

    def child() -> str:
        every_use_says(llm, "forked from it: make a new LLM in this process")
        with pytest.raises(EngineError, match="forked"):
            next(carried)
        carried.close()  # type: ignore[attr-defined]
        with llm:
            llm.close()
        assert llm.tokenizer is not None  # works anywhere
        return str(llm.tokenizer.encode("Hi"))

    assert llm.tokenizer is not None
    assert forked(child) == str(llm.tokenizer.encode("Hi"))
    last = [first, *carried][-1].output
    assert last is not None and last.as_dict() == expected[0]


def test_a_fork_while_another_thread_is_inside_a_step(llm: LLM) -> None:
    """Its locks stay taken in the child, which must not wait for them."""
    said: list[str] = []

    def fork() -> None:
        said.append(forked(lambda: every_use_says(llm, "forked") or llm.close() or "done"))

    with llm.observe(after_steps(3, fork)):
        Thread(lambda: llm.generate(["Hi"], SHORT, use_tqdm=False)).join()
    assert said == ["done"]


def test_a_model_that_is_loaded_in_a_fork(byte_checkpoint: Path) -> None:
    """With one thread: torch would wait for the others, which the fork does not have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = made(byte_checkpoint).generate(["Hi" * 50] * 4, SHORT, use_tqdm=False)

        def child() -> str:
            own = made(byte_checkpoint)
            answers = own.generate(["Hi" * 50] * 4, SHORT, use_tqdm=False)
            return f"{inherited.threads} {torch.get_num_threads()} {answers == expected}"

        def another_thread() -> str:
            """Loaded in a thread; the one that was forked, which steps, has two by then."""
            own: Any = Thread(lambda: made(byte_checkpoint, threads=2)).join().result
            had = torch.get_num_threads()
            answers = own.generate(["Hi" * 50] * 4, SHORT, use_tqdm=False)
            return f"{had} {torch.get_num_threads()} {answers == expected}"

        assert forked(child) == "True 1 True"
        assert forked(another_thread) == "2 1 True"
        assert not inherited.threads and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_cuda_in_a_fork(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is loaded."""
    monkeypatch.setattr(inherited, "cuda", True)
    for device in ("auto", "cuda", "cuda:1"):
        with pytest.raises(EngineError, match="'spawn' method, or set device='cpu'"):
            LLM(llm.config.model, device=device)
    assert made(Path(llm.config.model)).generate(["Hi"], SHORT, use_tqdm=False)


@pytest.mark.parametrize("how", ["collected", "exit", "closed"])
def test_ranks_outlive_what_a_fork_does(how: str) -> None:
    """Nothing that becomes of the copy in the child reaches the parent's other ranks."""
    with nothing_left():
        llm = LLM("tiny", device="cpu", max_model_len=256, tensor_parallel_size=2)
        expected = llm.generate(["Hi"], SHORT, use_tqdm=False)
        holder = [llm]

        def child() -> str:
            every_use_says(holder[0], "forked")
            if how == "exit":
                shared.weakref.finalize._exitfunc()  # type: ignore[attr-defined]
            elif how == "closed":
                holder[0].close()
            return "done"

        if how == "collected":
            # the test's own frame holds the engine, so the child drops all there is
            child = partial(_drop_all, holder, child)
        del llm
        assert forked(child) == "done"
        assert holder[0].generate(["Hi"], SHORT, use_tqdm=False) == expected
        holder[0].close()


def _drop_all(holder: list[LLM], work: Callable[[], str]) -> str:
    said = work()
    holder.clear()
    gc.collect()
    return said


def test_an_engine_is_closed_once_and_at_home(byte_checkpoint: Path) -> None:
    core, _ = build_engine(made(byte_checkpoint).config)
    closed: list[int] = []
    core.close = lambda: closed.append(os.getpid())  # type: ignore[method-assign]
    holder = [shared.SharedEngine(core)]
    assert forked(lambda: (holder[0].close(), len(closed))[1]) == "0"
    holder.clear()
    gc.collect()
    assert closed == [os.getpid()]
