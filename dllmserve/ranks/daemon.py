"""What makes a process somebody's: it ends when its owner does."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
#: seconds for which a process of ours may be stopped, by SIGSTOP for instance, before it is ended
STOPPED_S = 10.0


def prepare_process(owner: int) -> None:
    """Tie this process to its owner, and let the owner ask for stacks and handle Ctrl-C.

    Args:
        owner: process id of the owner.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner:  # it died before the line above
        raise SystemExit(0)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; False where the system does not tell.

    That a process says nothing does not show it: a healthy one is silent while C code holds
    Python's lock, for as long as a compilation or a large copy takes.
    """
    if fields := process_fields(Path(f"/proc/{pid}")):
        return fields[0] == "T"
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    try:  # without /proc, of a child only; whoever waits for it still gets its exit code
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


class StopClock:
    """For how long a process has been stopped.

    Args:
        pid: its id.
        pause_s: a longer pause between two looks means that this process did not run itself; it
            is not counted.
    """

    def __init__(self, pid: int, pause_s: float) -> None:
        self._pid, self._pause_s = pid, pause_s
        self._looked = self._ran = time.monotonic()

    def seconds(self) -> float:
        """Look at the process; seconds since it was last seen not to be stopped."""
        now = time.monotonic()
        if now - self._looked > self._pause_s or not is_stopped(self._pid):
            self._ran = now
        self._looked = now
        return now - self._ran


def process_fields(directory: Path) -> list[str]:
    """What Linux says of a process, from the third field on: state, parent's id, and so on.

    Args:
        directory: ``/proc/PID``.

    Returns:
        Nothing if the process has ended, or this is not Linux.
    """
    try:
        found = (directory / "stat").read_text(errors="replace")
    except OSError:
        return []
    return found.rpartition(")")[2].split()  # the name, in parentheses, may be any bytes
