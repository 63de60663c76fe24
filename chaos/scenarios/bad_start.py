"""Servers that cannot start: they say why in a line, at once, and end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from chaos.scenario import Ground, Report, Scenario
from chaos.server import SERVE, run_to_end

#: seconds within which the end has to come
END_S = 10.0
_AT_ONCE = 2
#: the only one that needs another server beside it
_IN_USE = "job store in use"


async def run(ground: Ground, report: Report, *, cases: tuple[str, ...]) -> None:
    """Start each of the servers that cannot work."""
    folder = ground.place("bad-start")
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str, command: list[str]) -> tuple[str, float, list[str]]:
        async with slots:
            code, text, seconds = await run_to_end(command, folder, END_S + 5)
        return name, seconds, list(_wrong(code, text, seconds))

    with _taken_port() as port:
        commands = _commands(ground.model, folder, port)
        chosen = {name: commands[name] for name in cases or commands}
        other = ground.server(folder)
        if _IN_USE in chosen:
            await other.start()
        results = await asyncio.gather(*[one(*item) for item in chosen.items()])
        if _IN_USE in chosen:
            report.expect(other.running, "the server beside them has ended")
            await other.end()
    for name, _, wrong in results:
        report.wrong += [f"{name}: {text}" for text in wrong]
    report.measured |= {
        "cases": len(results),
        "longest s": round(max(seconds for _, seconds, _ in results), 1),
    }
    report.wrong += [f"left behind: {path.name}" for path in folder.glob("dllmserve-*")]


def _wrong(code: int | None, text: str, seconds: float) -> Iterator[str]:
    """What is wrong with such an end."""
    if code is None or seconds > END_S:
        yield f"it took {seconds:.1f} s"
    if code == 0:
        yield "exit code 0"
    if "Traceback" in text:
        yield f"a traceback: {text[-300:]}"
    reasons = [line for line in text.splitlines() if line.startswith("error: ")]
    if len(reasons) != 1 or len(reasons[0]) > 500:
        yield f"{len(reasons)} lines with the reason: {text[-300:]}"


def _commands(model: Path, folder: Path, port: int) -> dict[str, list[str]]:
    """Commands that cannot work, by what is wrong with them."""
    free = ("--port", "0", "--job-store")

    def serve(*arguments: object, store: object = "memory") -> list[str]:
        return [*SERVE, *map(str, arguments), *free, str(store)]

    file = folder / "a-file"
    file.write_text("no database\n" * 100)
    config = folder / "config.yaml"
    config.write_text("prot: 9000\n")
    keys = folder / "no-keys.txt"
    keys.write_text("# none\n")
    garbage, cut, hole = (_broken(model, folder, how) for how in ("garbage", "cut", "hole"))
    return {
        "missing model": serve(folder / "nowhere"),
        "empty model folder": serve(_empty(folder)),
        "garbage in the weights": serve(garbage),
        "weights cut off": serve(cut),
        "a tensor missing": serve(hole),
        "broken config.json": serve(_broken(model, folder, "config")),
        "unknown key in --config": serve(model, "--config", config),
        "missing --config": serve(model, "--config", folder / "nowhere.yaml"),
        "port taken": [*SERVE, str(model), "--port", str(port), "--job-store", "memory"],
        _IN_USE: serve(model, store=folder / "jobs.sqlite3"),
        "job store is no database": serve(model, store=file),
        "job store below a file": serve(model, store=file / "jobs.sqlite3"),
        "job store cannot be written": serve(model, store="/proc/jobs.sqlite3"),
        "no keys in the key file": serve(model, "--api-key-file", keys),
        "open to all without a key": serve(model, "--host", "0.0.0.0"),
        "no TLS certificate": serve(
            model, "--ssl-certfile", folder / "c.pem", "--ssl-keyfile", folder / "k.pem"
        ),
        "wrong value": serve(model, "--max-requests", "0"),
        "model longer than it can be": serve(model, "--max-model-len", "1000000"),
    }


def _empty(folder: Path) -> Path:
    empty = folder / "empty"
    empty.mkdir()
    return empty


def _broken(model: Path, folder: Path, how: str) -> Path:
    """A copy of the checkpoint with something wrong in it."""
    copy = folder / f"model-{how}"
    shutil.copytree(model, copy)
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    if how == "garbage":
        weights.write_bytes(os.urandom(len(data)))
    elif how == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "config":
        (copy / "config.json").write_text('{"architectures": [')
    else:
        settings = json.loads((copy / "config.json").read_text())
        settings["n_layers" if "n_layers" in settings else "num_hidden_layers"] += 1
        (copy / "config.json").write_text(json.dumps(settings))
    return copy


@contextlib.contextmanager
def _taken_port() -> Iterator[int]:
    """A port on which something listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


BAD_START = Scenario(
    name="bad-start",
    does="18 starts that cannot work: models, configuration, port, job store, keys, certificates",
    passes="over within 10 s, exit code not 0, one line that says why, no traceback, nothing left",
    run=run,
    full={"cases": ()},
    quick={"cases": ("unknown key in --config", "port taken", "job store is no database")},
)
