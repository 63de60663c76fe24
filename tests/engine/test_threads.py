"""Threads of torch while an engine loads or steps on a CPU: how many, and for whom."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM
from dllmserve.config import EngineConfig
from dllmserve.engine import machine as engine_machine
from dllmserve.engine import setup
from dllmserve.engine.machine import choose_threads, rank_threads, with_threads
from dllmserve.errors import ConfigError, ModelError
from dllmserve.tools.environment import header_lines

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of 16 cores, where torch has a thread for each; nothing is really changed."""
    present = [16]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: present[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: present.__setitem__(0, n))
    machine(monkeypatch)
    yield


def machine(patch: pytest.MonkeyPatch, usable: int = 16, busy: bool = False) -> None:
    patch.setattr(engine_machine, "physical_cores", lambda: {str(n) for n in range(16)})
    patch.setattr(engine_machine, "allowed_cpus", lambda: set(range(32)))
    patch.setattr(engine_machine, "usable_cores", lambda: usable)
    patch.setattr(engine_machine, "waits_busily", lambda: busy)


def chosen(**options: Any) -> int:
    return choose_threads(EngineConfig(**options))


def test_as_many_as_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == 16
    assert chosen(threads=40) == 40
    machine(monkeypatch, usable=4)
    assert chosen() == 4
    machine(monkeypatch, usable=4, busy=True)  # a core is left for others
    assert chosen() == 3
    machine(monkeypatch, usable=1, busy=True)
    assert chosen() == 1
    torch.set_num_threads(32)  # as torch begins without MKL: untouched as well
    assert chosen() == 1


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, usable=4)
    for number in (2, 9):
        torch.set_num_threads(number)
        assert chosen() == number
    torch.set_num_threads(16)
    monkeypatch.setenv("MKL_NUM_THREADS", "16")
    assert chosen() == 16
    assert chosen(threads=2) == 2


def rank(device: torch.device = CPU, own: bool = False, **options: Any) -> int | None:
    return rank_threads(EngineConfig(**options), device, own=own)


def test_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (4, 16):
        with with_threads(number):
            assert torch.get_num_threads() == number
            torch.set_num_threads(7)
        assert torch.get_num_threads() == 16
    with pytest.raises(KeyError), with_threads(4):
        raise KeyError
    assert torch.get_num_threads() == 16
    with with_threads(None):
        assert torch.get_num_threads() == 16


def test_ranks_divide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, usable=4)
    assert rank() == 4
    assert rank(tensor_parallel_size=3) == 1
    assert rank(threads=8, tensor_parallel_size=2) == 4
    assert rank(threads=1, tensor_parallel_size=2) == 1
    # a process that was started as a rank keeps what it was given
    assert rank(own=True) is None
    assert rank(own=True, threads=8, tensor_parallel_size=2) == 4


def test_an_engine_on_a_gpu_changes_nothing() -> None:
    assert rank(torch.device("cuda")) is None


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_one_in_a_forked_process(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks; and more are not put back, because torch would wait for them."""
    monkeypatch.setattr(engine_machine.inherited, "threads", True)
    assert rank(device) == rank(device, own=True) == 1
    assert rank(threads=8) == rank(own=True, threads=8) == 1
    with with_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


def test_after_the_load_all_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("tiny", device="cpu", threads=3) as llm:
        assert torch.get_num_threads() == 16
        assert llm.plan.threads == 3
        assert "(3 threads)" in header_lines(llm.config, llm.plan)["device"]
    assert torch.get_num_threads() == 16
    machine(monkeypatch, usable=4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        LLM(str(tmp_path), device="cpu")
    assert torch.get_num_threads() == 16


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_has_no_such_number(device: str) -> None:
    with pytest.raises(ConfigError, match=f"threads=3 is for an engine on a CPU.*{device}: leave"):
        EngineConfig(device=device, threads=3)
    assert EngineConfig(device=device).threads is None


def test_a_gpu_that_auto_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "choose_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"threads=3 is for an engine on a CPU.*cuda:0: leave"):
        LLM("tiny", threads=3)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", 100_000])
def test_what_is_no_number_of_threads(value: Any) -> None:
    with pytest.raises(ConfigError, match="threads must be an integer"):
        EngineConfig(threads=value)


def test_ranks_get_their_part(tmp_path: Path) -> None:
    """Without anything that was said before; both ranks say what they have."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    code = (
        "import os; from dllmserve import LLM, SamplingParams\n"
        "llm = LLM('tiny', device='cpu', tensor_parallel_size=2, threads=6)\n"
        "import torch; before = torch.get_num_threads()\n"
        "said = []; note = lambda plan: said.append(torch.get_num_threads())\n"
        "few = SamplingParams(gen_length=2)\n"
        "with llm.observe(note): llm.generate(['Hi'], few, use_tqdm=False)\n"
        "print(set(said))\n"
        "for pid in os.listdir('/proc'):\n"
        "    try: said = open(f'/proc/{pid}/environ').read(), open(f'/proc/{pid}/stat').read()\n"
        "    except OSError: continue\n"
        "    if said[1].rpartition(')')[2].split()[1] == str(os.getpid()):\n"
        "        print([v for v in said[0].split('\\0') if v.startswith(('OMP_', 'MKL_'))])\n"
        "llm.close(); print(torch.get_num_threads() == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "{3}" and lines[-1] == "True", done.stderr
    assert {"OMP_NUM_THREADS=3", "MKL_NUM_THREADS=3", "OMP_WAIT_POLICY=PASSIVE"} <= set(
        eval(lines[1])
    )
