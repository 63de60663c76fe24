"""Threads of torch in steps: those of the engine, whichever thread steps; then what was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from dllmserve import LLM, SamplingParams

SHORT = SamplingParams(temperature=0.0, gen_length=4, steps=4, ignore_eos=True)
T = TypeVar("T")


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    """Three threads here, by a call; so the engine chooses as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(byte_checkpoint: Path) -> Callable[..., LLM]:
    return lambda **options: LLM(str(byte_checkpoint), device="cpu", **options)


def in_steps(llm: LLM) -> set[int]:
    """Numbers of threads in the steps of a call that the calling thread makes."""
    found: set[int] = set()
    with llm.observe(lambda plan: found.add(torch.get_num_threads())):
        llm.generate(["Hi"], SHORT, use_tqdm=False)
    return found


def apart(work: Callable[[], T], number: int) -> T:
    """Work in a new thread that has chosen a number before; it still has it afterwards."""

    def run() -> T:
        result = work()
        assert torch.get_num_threads() == number
        return result

    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.set_num_threads, number).result()
        return pool.submit(run).result()


def test_a_thread_with_another_number(make: Callable[..., LLM]) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3  # it has used torch
        llm = make(threads=1)
        assert pool.submit(in_steps, llm).result() == {1}
        assert pool.submit(torch.get_num_threads).result() == 3
        assert apart(lambda: in_steps(llm), 5) == {1}
        assert in_steps(llm) == {1} and torch.get_num_threads() == 3


def test_loaded_and_closed_elsewhere(make: Callable[..., LLM]) -> None:
    llm = apart(lambda: make(threads=2), 4)
    assert torch.get_num_threads() == 3
    assert in_steps(llm) == {2} and torch.get_num_threads() == 3
    apart(llm.close, 4)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("first", [0, 1])
def test_two_engines(make: Callable[..., LLM], first: int) -> None:
    both = [make(threads=1), make(threads=2)]
    assert [in_steps(llm) for llm in both] == [{1}, {2}]
    assert torch.get_num_threads() == 3
    both[first].close()
    assert in_steps(both[1 - first]) == {2 - first}
    both[1 - first].close()
    assert torch.get_num_threads() == 3


def test_one_step_inside_another(make: Callable[..., LLM]) -> None:
    outer, inner = make(threads=1), make(threads=2)
    said: list[tuple[int, set[int], int]] = []

    def note(plan: object) -> None:
        if not said:
            before = torch.get_num_threads()
            said.append((before, in_steps(inner), torch.get_num_threads()))

    with outer.observe(note):
        assert in_steps(outer) == {1}
    assert said == [(1, {2}, 1)] and torch.get_num_threads() == 3


def test_the_number_stays_for_life(make: Callable[..., LLM]) -> None:
    one, chosen = make(threads=1), make()
    assert in_steps(chosen) == {3}
    one.close()
    assert in_steps(chosen) == {3}
    torch.set_num_threads(2)  # after the load: for the program's own work
    assert in_steps(chosen) == {3} and torch.get_num_threads() == 2


def test_a_step_that_fails(make: Callable[..., LLM]) -> None:
    llm = make(threads=1)

    def fail(plan: object) -> None:
        raise KeyError("mine")

    with llm.observe(fail), pytest.raises(KeyError):
        llm.generate(["Hi"], SHORT, use_tqdm=False)
    assert torch.get_num_threads() == 3
    assert in_steps(llm) == {1}
