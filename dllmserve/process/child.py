"""For a child process: it ends when its owner ends, and sends heartbeats while it lives."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dllmserve.process.channel import Channel, ChannelClosed
from dllmserve.process.messages import Heartbeat, encode

_PR_SET_PDEATHSIG = 1
#: longest silence of a healthy worker, in seconds, but for a step of an engine that takes longer
HEARTBEAT_S = 0.5


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
    if os.getppid() != owner:  # the owner died before the line above
        raise SystemExit(0)


def start_heartbeat(channel: Channel) -> None:
    """Send a heartbeat every half second, from a thread, until this process ends.

    A rank needs the thread, because it waits for other ranks in the middle of a step. The thread
    also ends the process when the owner is gone, where the kernel does not do so.
    """

    def run() -> None:
        never = threading.Event()
        try:
            while not never.wait(HEARTBEAT_S):
                channel.send(encode(Heartbeat()))
        except ChannelClosed:
            exit_now()

    threading.Thread(target=run, name="dllmserve-heartbeat", daemon=True).start()


def exit_now() -> NoReturn:
    """End the process at once, even while a thread waits for a rank that is gone."""
    with suppress(OSError):  # the reader of standard output may be gone
        sys.stdout.flush()
    os._exit(0)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; False where the system does not tell.

    Silence alone does not prove it. A healthy process is silent while C code holds Python's lock,
    for as long as a compilation or a large copy takes.
    """
    if fields := process_fields(Path(f"/proc/{pid}")):
        return fields[0] == "T"
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    try:  # without /proc, of a child only; whoever waits for it still gets its exit code
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


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
