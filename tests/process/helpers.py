"""Shared by the tests of processes: engines without a model, waiting, killing."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllmserve.process.fleet import Fleet
from dllmserve.process.supervisor import SupervisorOptions

CHILD = Path(__file__).parent / "light_child.py"


def light(how: str, directory: Path, **given: Any) -> SupervisorOptions:
    """Engines that light_child.py plays, with the fault that ``how`` names."""
    command = (sys.executable, str(CHILD), how, str(directory))
    return SupervisorOptions(command=command, **{"load_timeout_s": 60.0, **given})


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def kill(fleet: Fleet, index: int) -> None:
    """Kill an engine."""
    pid = fleet.supervisors[index].engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
