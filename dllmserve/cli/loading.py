"""The time between the command and the model: a spinner, and a Ctrl-C that works."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from dllmserve._system import refuse_windows
from dllmserve.cli import INTERRUPTED

_STDERR = 2
_CLEAN = b"\r\x1b[2K\x1b[?25h"


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Say at once, on stderr and only to a terminal, that a model is being loaded.

    Raises:
        ConfigError: no model runs on this system.
    """
    refuse_windows()
    console = Console(stderr=True, highlight=False, emoji=False)
    spins = console.is_terminal and not console.is_dumb_terminal
    with _leave_at_once(_CLEAN if spins else b""):
        if not spins:
            yield
            return
        text = Text(f"loading {model} ...")
        text.truncate(max(console.width - 3, 1), overflow="ellipsis")  # one line, with the spinner
        with console.status(text):
            yield


@contextmanager
def _leave_at_once(before: bytes) -> Iterator[None]:
    """Make Ctrl-C end the process.

    A KeyboardInterrupt inside an import can get lost: libraries swallow it while they
    probe for optional parts. There is nothing to clean up yet but the spinner.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield  # whoever started this in the background wants Ctrl-C to be ignored
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(_STDERR, before + b"interrupted\n")
        os._exit(INTERRUPTED)

    old = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
