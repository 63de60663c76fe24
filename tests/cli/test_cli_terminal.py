"""``dllmserve generate`` in a real (pseudo) terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

COMMAND = "import sys; from dllmserve.cli.main import main; sys.exit(main())"
#: one token a step, so that there is something to watch
EXACT = ("--quality", "exact")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program on a pseudo terminal of a given size."""

    def __init__(
        self, args: list[str], environment: dict[str, str], rows: int = 24, columns: int = 80
    ) -> None:
        self._own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *args],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            # a job in the background of a script inherits an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(other)
        self.written = ""

    def read(self, until: str = "", seconds: float = 60) -> str:
        """Read until a text was written, or to the end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (until and until in self.written):
            if not select.select([self._own], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._own, 65536)
            except OSError:  # how a pty says that it ended
                break
            if not data:
                break
            self.written += data.decode(errors="replace")
        return self.written

    def finish(self) -> int:
        """Exit code, after reading all."""
        self.read()
        code = self.process.wait(timeout=60)
        os.close(self._own)
        return code


def _plain(text: str) -> str:
    return ANSI.sub("", text)


def test_live_canvas(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hello", "--gen-length", "40", "--ignore-eos"]
    terminal = Terminal([*args, "--quality", "exact"], environment)
    assert terminal.finish() == 0
    written = terminal.written
    assert "loading" in written
    assert re.search(r"\x1b\[(2;36|36|96)m[░▒▓]", written), "no masks"
    assert re.search(r"\x1b\[1;32m[^\x1b]", written), "no newly committed text"
    assert "·" in written, "no masked slots"
    assert "40/40 committed" in written
    assert "\x1b[?25h" in written, "the cursor was not given back"
    assert re.search(
        r"40 tokens · 40 forwards · \d+\.\d\d s · [\d.]+ tokens/s · length · quality", written
    )
    # the finished answer is plain: after the canvas was wiped nothing provisional is left
    assert not re.search("[░▒▓·]\\S", written.rpartition("\x1b[?25h")[2])


def test_demo_without_prompts(checkpoint: Path, environment: dict[str, str]) -> None:
    terminal = Terminal(["generate", "-m", str(checkpoint), "--gen-length", "4"], environment)
    assert terminal.finish() == 0
    written = _plain(terminal.written)
    assert "> Solve this 4x4 sudoku:" in written
    assert written.count(" tokens/s") >= 3


def test_no_live(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hi", "--gen-length", "4", "--no-live"]
    terminal = Terminal(args, environment)
    assert terminal.finish() == 0
    assert "committed" not in terminal.written
    assert " forward" in terminal.written


def test_many_prompts_run_as_a_batch(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), *"abcd", "--gen-length", "4"]
    terminal = Terminal(args, environment)
    assert terminal.finish() == 0
    written = _plain(terminal.written)
    assert "committed" not in written
    assert "Generating" in written and "4 answers" in written
    assert all(f"> {p}" in written for p in "abcd")


@pytest.mark.parametrize("size", [(6, 20), (4, 8)])
def test_any_size(checkpoint: Path, environment: dict[str, str], size: tuple[int, int]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hi", "--gen-length", "200", "--steps", "12"]
    terminal = Terminal([*args, "--ignore-eos"], environment, *size)
    assert terminal.finish() == 0
    # no frame is higher than the terminal: the cursor goes up by less than its height
    wiped = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", terminal.written)
    assert wiped and max(w.count("\x1b[1A") for w in wiped) < size[0]


def test_no_color(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hi", "--gen-length", "8", "--quality", "exact"]
    terminal = Terminal(args, {**environment, "NO_COLOR": "1"})
    assert terminal.finish() == 0
    assert not re.search(r"\x1b\[(?:\d+;)*[39]\d", terminal.written)
    assert "\x1b[2m" in terminal.written and re.search("[░▒▓]", terminal.written)


def test_dumb_terminal(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hi", "--gen-length", "8"]
    terminal = Terminal(args, {**environment, "TERM": "dumb"})
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.written


#: options of an answer that takes its time
LONG = ("--gen-length", "480", "--ignore-eos", "--steps", "480")


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.6])
def test_ctrl_c_while_loading(checkpoint: Path, environment: dict[str, str], delay: float) -> None:
    # the import of torch swallows a plain KeyboardInterrupt at some of its places
    terminal = Terminal(["generate", "-m", str(checkpoint), "Hi", *LONG], environment)
    terminal.read("loading")
    time.sleep(delay)
    _interrupted(terminal)


def test_ctrl_c_while_decoding(checkpoint: Path, environment: dict[str, str]) -> None:
    terminal = Terminal(["generate", "-m", str(checkpoint), "Hi", *LONG], environment)
    terminal.read("committed")
    _interrupted(terminal)
    assert "committed" in terminal.written.rpartition("interrupted")[0]


def _interrupted(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.written
    assert terminal.written.count("interrupted") == 1
    assert "\x1b[?25h" in terminal.written


def test_json_is_clean_in_a_terminal(checkpoint: Path, environment: dict[str, str]) -> None:
    args = ["generate", "-m", str(checkpoint), "Hi", "--gen-length", "4", "--json"]
    terminal = Terminal(args, environment)
    assert terminal.finish() == 0
    assert "committed" not in terminal.written
    assert '{"prompt": "Hi"' in terminal.written


def test_errors_in_a_terminal(checkpoint: Path, environment: dict[str, str]) -> None:
    terminal = Terminal(["generate", "-m", str(checkpoint), "Hi", "--steps", "0"], environment)
    assert terminal.finish() == 1
    assert _plain(terminal.written).strip().startswith("error: steps must be")
