"""A ``dllmserve serve`` process, seen from outside: started, watched, signalled, cleared away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from prometheus_client.parser import text_string_to_metric_families

from chaos.client import Client, LostAnswer

SERVE = (sys.executable, "-m", "dllmserve", "serve")
_LISTENS = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
_START_S = 60.0
_PREFIX = "dllmserve:"


class Died(Exception):
    """The server ended when it should not have."""


class Server:
    """One server process, with a folder for temporary files that nothing else uses.

    Args:
        folder: for its log, temporary files and job store.
        model: of the server.
        *options: of ``dllmserve serve``.
        program: what is run instead of ``dllmserve serve``.
        open_files: limit of file descriptors, or None.
        environment: more variables.

    Attributes:
        port: where it listens, once it has started.
        engines: process ids of all engines that were seen.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *options: str,
        program: Sequence[str] = SERVE,
        open_files: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = 0
        self.engines: set[int] = set()
        self.log = folder / f"{time.monotonic_ns()}.log"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self._command = [*program, str(model), "--port", "0", "--log-format", "json", *options]
        if "--job-store" not in options:
            self._command += ["--job-store", str(folder / "jobs.sqlite3")]
        self._environment = _clean_environment() | {
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self._open_files = open_files
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Server:
        await self.start()
        await self.until_ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.end()

    @property
    def pid(self) -> int:
        """Of the API process."""
        if self._process is None:
            raise Died("the server was not started")
        return self._process.pid

    @property
    def process(self) -> psutil.Process:
        """The API process, to measure."""
        return psutil.Process(self.pid)

    @property
    def running(self) -> bool:
        """Whether the API process has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process and wait until it listens; the model is not loaded then.

        Raises:
            Died: it ended instead.
        """
        limit = self._open_files

        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for us alone
                preexec_fn=limited,
            )
        until = time.monotonic() + _START_S
        while (found := _LISTENS.search(self.log.read_text(errors="replace"))) is None:
            self._still_runs()
            if time.monotonic() > until:
                raise Died(f"the server did not listen after {_START_S:g} s")
            await asyncio.sleep(0.02)
        self.port = int(found[1])

    async def until_ready(self, timeout_s: float = _START_S) -> float:
        """Wait until /ready says 200; returns the seconds it took."""
        began = time.monotonic()
        async with Client(self.port) as client:
            while not await self.is_ready(client):
                self._still_runs()
                if time.monotonic() - began > timeout_s:
                    raise Died(f"the server was not ready after {timeout_s:g} s")
                await asyncio.sleep(0.02)
        self.engine()
        return time.monotonic() - began

    async def is_ready(self, client: Client) -> bool:
        """One look at /ready."""
        try:
            return (await client.get("/ready")).status == 200
        except LostAnswer:
            return False

    def _still_runs(self) -> None:
        if not self.running:
            tail = self.log.read_text(errors="replace")[-400:]
            raise Died(f"the server ended with code {self.code}: {tail}")

    @property
    def code(self) -> int | None:
        """Exit code, once it has ended."""
        return None if self._process is None else self._process.returncode

    def engine(self) -> psutil.Process | None:
        """The engine's process, rank 0 of several, if there is one now."""
        return next(iter(self.ranks()), None)

    def ranks(self) -> list[psutil.Process]:
        """All processes of the engine that run now, rank 0 first."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess, Died):
            for child in self.process.children():
                if alive(child):
                    found += [child, *filter(alive, child.children(recursive=True))]
        self.engines.update(process.pid for process in found)
        return found

    async def metrics(self) -> dict[str, float]:
        """Every figure of /metrics without its prefix; those with several labels are added up."""
        async with Client(self.port) as client:
            page = (await client.get("/metrics")).body.decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if "le" not in sample.labels:
                    name = sample.name.removeprefix(_PREFIX)
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the API process alone."""
        os.kill(self.pid, number)

    async def ended(self, timeout_s: float) -> int | None:
        """Wait for the end; returns the exit code, or None if it still runs."""
        if self._process is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        return self._process.returncode

    async def end(self) -> int | None:
        """Stop the server, kindly and then not; returns the exit code of the kind way."""
        if self._process is None:
            return None
        self.engine()
        if self.running:
            self.signal(signal.SIGTERM)
        code = await self.ended(15.0)
        if code is None:
            self.signal(signal.SIGKILL)
            await self._process.wait()
        return code

    async def leftovers(self, timeout_s: float = 5.0) -> list[str]:
        """What should have gone with the server and has not."""
        until = time.monotonic() + timeout_s
        while orphans := [pid for pid in self.engines if _exists(pid)]:
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        found = [f"engine process {pid} still runs" for pid in orphans]
        return found + [f"left in TMPDIR: {path.name}" for path in self.temporary.iterdir()]


def alive(process: psutil.Process) -> bool:
    """Whether a process runs, and has not merely not been buried."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


async def run_to_end(
    command: Iterable[str], folder: Path, timeout_s: float
) -> tuple[int | None, str, float]:
    """Run a command that should end by itself: exit code, all it wrote, seconds."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=_clean_environment() | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            written, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        written, _ = await process.communicate()
        return None, written.decode(errors="replace"), time.monotonic() - began
    return process.returncode, written.decode(errors="replace"), time.monotonic() - began


def _exists(pid: int) -> bool:
    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _clean_environment() -> dict[str, str]:
    """This process's environment without options of a server."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DLLMSERVE_") and name not in ("MODEL_PATH", "WEB_CONCURRENCY")
    }
