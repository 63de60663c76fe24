"""Schemathesis against a server with a small random model, without keys and with keys.

python -m tests.server.fuzz.schema --st .venv-fuzz/bin/st
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.checkpoints import Shape, byte_tokenizer, write_random
from tests.server.clients.started import Started, started

ROOT = Path(__file__).parents[3]
KEY = "a-key-for-the-fuzzer-and-nobody-else"
#: room for jobs that come faster than they are done: a 503 would rightly be an answer to them
OPTIONS = ["--default-max-tokens", "8", "--max-requests", "10000"]
OPTIONS += ["--max-outstanding-work", str(10**12)]


def byte_model(folder: Path) -> Path:
    """A random LLaDA over bytes, small enough for thousands of requests a minute."""
    shape = Shape(family="llada", vocab=260, mask_id=259, eos_ids=(256,), max_len=160, seed=9)
    write_random(folder, shape)
    byte_tokenizer(folder, chat=True)
    return folder


def check(server: Started, st: str, examples: int, report: Path, *options: str) -> int:
    """Run every phase with every check; the number of cases.

    Raises:
        SystemExit: a check failed, or the server's log has what it must not have.
    """
    command = [st, "--config-file", str(ROOT / "schemathesis.toml")]
    command += ["run", f"{server.url}/openapi.json", "--mode", "all", "--checks", "all"]
    command += ["--workers", "2", "--max-examples", str(examples), "--no-color"]
    command += ["--report", "json", "--report-json-path", str(report), *options]
    done = subprocess.run(command, cwd=ROOT, check=False)
    lines = server.requests()
    statuses = Counter(line["status"] for line in lines)
    print("statuses:", dict(sorted(statuses.items())))
    failed = [line for line in lines if line["status"] >= 500]
    failed += [line for line in server.lines() if line["level"] in ("ERROR", "CRITICAL")]
    if done.returncode or failed or server.process.poll() is not None:
        print("\n".join(map(json.dumps, failed[:20])))
        sys.exit(f"schemathesis ended with {done.returncode}; {len(failed)} bad lines in the log")
    return len(lines)


def main() -> None:
    """Parse the arguments and run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--st", default="st", help="the schemathesis command")
    parser.add_argument("--examples", type=int, default=150, help="of each operation")
    arguments = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        options = [str(byte_model(place / "model")), *OPTIONS]
        report = place / "report.json"
        with started(place, *options) as server:
            total += check(server, arguments.st, arguments.examples, report)
        with started(place, *options, DLLMSERVE_API_KEYS=KEY) as server:
            header = f"Authorization: Bearer {KEY}"
            total += check(server, arguments.st, arguments.examples, report, "--header", header)
    print(f"{total} requests, no failure")


if __name__ == "__main__":
    main()
