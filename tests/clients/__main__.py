"""Plays the scenarios of the clients that are installed, and prints a table; see README.md."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.server.clients.started import started

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: each client has an environment of its own: they want different versions of what they share
ENVIRONMENTS = ROOT / ".venv-clients"
#: clients of Python's, by their modules here
CLIENTS = sorted(path.stem.removeprefix("with_") for path in HERE.glob("with_*.py"))


def command(name: str, url: str, model: str, environments: Path) -> list[str] | None:
    """What plays a client's scenarios; None if the client is not installed."""
    if name == "node":
        there = shutil.which("node") and (HERE / "node" / "node_modules").is_dir()
        script = str(HERE / "node" / "scenarios.mjs")
        return ["node", script, f"{url}/v1", model] if there else None
    python = environments / name / "bin" / "python"
    return [str(python), "-m", "tests.clients.play", name, url, model] if python.exists() else None


def rows(argv: list[str]) -> Iterator[dict[str, str]]:
    """What a client's scenarios tell, one after the other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # some clients print words of their own
                yield json.loads(line)
    if process.returncode:
        text = f"it ended with status {process.returncode}"
        yield {"client": argv[-3], "version": "", "scenario": "", "seconds": "0", "wrong": text}


def main() -> int:
    """Print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--url", help="of a server, without /v1; one is started without it")
    parser.add_argument("clients", nargs="*", help=f"some of {', '.join(CLIENTS)}, node")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    given = parser.parse_args()
    names = given.clients or [*CLIENTS, "node"]
    if given.url is not None:
        return table(names, given.url.rstrip("/"), given.model, given.environments)
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as server:
        return table(names, server.url, given.model, given.environments)


def table(names: list[str], url: str, model: str, environments: Path) -> int:
    """Print what came of all scenarios; 1 if something failed, or nothing could be played."""
    played = failed = 0
    for name in names:
        argv = command(name, url, model, environments)
        if argv is None:
            print(f"{name:32}not installed: make clients", flush=True)
            continue
        for row in rows(argv):
            played, failed = played + 1, failed + bool(row["wrong"])
            state = f"FAILED  {' '.join(row['wrong'].split())[:160]}" if row["wrong"] else "ok"
            where = f"{row['client']:32}{row['version']:10}{row['scenario']:22}"
            print(f"{where}{float(row['seconds']):6.1f} s  {state}", flush=True)
    print(f"{played} scenarios, {failed} failed")
    return 1 if failed or not played else 0


if __name__ == "__main__":
    sys.exit(main())
