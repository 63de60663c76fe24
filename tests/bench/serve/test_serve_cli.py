"""``dllmserve bench serve``: what is printed, the record, files and one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dllmserve import __version__
from dllmserve.cli.main import main
from tests.bench.serve.fake import Fake, Plan

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks.md"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLLMSERVE_API_KEY", raising=False)


def lines(capfd: pytest.CaptureFixture[str], fake: Fake, *args: str | Path) -> list[str]:
    assert main(["bench", "serve", "--url", fake.url, *map(str, args)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_report(capfd: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path) -> None:
    fake.plan = lambda number: Plan(headers={"X-Queue-Time": "0.125"})
    records, plot = tmp_path / "records.jsonl", tmp_path / "load.png"
    out = lines(
        capfd,
        fake,
        *("--rates", "20,50", "--requests", "5", "--slo-total", "15", "--body", '{"steps": 3}'),
        *("--api-key", "geheim", "--header", "X-Team: geheim", "--records", records),
        *("--plot", plot),
    )
    text = "\n".join(out)
    assert "geheim" not in text + records.read_text()
    assert all(len(line) <= 100 for line in out[:-1])
    for part in (
        "chat, streamed, model fake-8b",
        "steps=3",
        "Poisson process, 20, 50 requests/s, seed 0",
    ):
        assert part in text
    assert "from the scheduled arrival" in text and "good: total <= 15 s" in text
    rows = [line.split() for line in out[:-1] if line.lstrip().startswith(("20 ", "50 "))]
    assert [row[0] for row in rows] == ["20", "50", "20", "50"]
    assert rows[0][1] == "5" and rows[0][3:6] == ["5", "0", "0"]
    assert rows[0][8:10] == ["3.00", "100.0%"]
    assert rows[2][1:5] == ["0.125"] * 4 and len(rows[2]) == 13
    found = json.loads(out[-1])
    assert (found["benchmark"], found["schema"], found["interrupted"]) == ("serve", 1, False)
    assert found["versions"]["dllmserve"] == __version__
    assert [r["rate"] for r in found["results"]] == [20.0, 50.0]
    assert [r["good"]["share"] for r in found["results"]] == [1.0, 1.0]
    assert plot.stat().st_size > 10_000
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(k["row"], k["rate"], k["kind"]) for k in kept] == [(0, 20.0, "ok")] * 5 + [
        (1, 50.0, "ok")
    ] * 5
    assert all(k["scheduled"] <= k["started"] <= k["sent"] <= k["finished"] for k in kept)
    page = PAGE.read_text(encoding="utf-8").partition("## Load on a server")[2]
    named = {*found, *_keys(found["results"][0]), *found["options"], *kept[0]}
    named -= {"503", "429"}
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)


def test_json_prompts_and_key(
    capfd: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLLMSERVE_API_KEY", "geheim")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    args = ("--rate", "inf", "-n", "4", "--prompts", prompts, "--endpoint", "completions", "--json")
    (line,) = lines(capfd, fake, *args, "--warmup", "0", "--no-stream", "-m", "mine")
    assert "geheim" not in line
    found = json.loads(line)
    assert found["options"]["rates"] == ["inf"] and found["options"]["api_key"] is True
    assert sorted(s.body["prompt"] for s in fake.seen) == ["one", "one", "two", "two"]
    assert {s.headers["authorization"] for s in fake.seen} == {"Bearer geheim"}
    assert found["model"] == "mine" and found["results"][0]["arrivals"] == "at once"


def test_trace_and_native(capfd: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at": 0.1, "prompt": "b"}\n{"at": 0, "prompt": "a", "gen_length": 3}\n')
    out = lines(capfd, fake, "--trace", trace, "--endpoint", "native", "--warmup", "0")
    assert [(s.body["prompt"], s.body["gen_length"]) for s in fake.seen] == [("a", 3), ("b", 64)]
    assert "native, submit and poll" in out[0]
    assert any(line.split()[:2] == ["trace", "2"] for line in out)


def test_failures_are_named(capfd: pytest.CaptureFixture[str], fake: Fake) -> None:
    fake.plan = lambda number: Plan(status=500) if number % 2 else Plan(status=503)
    out = "\n".join(lines(capfd, fake, "--rate", "inf", "-n", "4", "--warmup", "0"))
    assert "rate inf: 2 rejected (2 with 503)" in out
    assert "rate inf: 2 failed, http 500, the first: no: 500" in out


@pytest.mark.parametrize("what", [["--rates", "10,inf"], ["--rates", "10,100"]])
def test_plots_of_odd_rows(fake: Fake, tmp_path: Path, what: list[str]) -> None:
    fake.plan = lambda number: Plan(status=500)
    path = tmp_path / "load.svg"
    args = ["--url", fake.url, "-n", "1", "--warmup", "0", "--plot", str(path), *what]
    assert main(["bench", "serve", *args]) == 0
    assert path.stat().st_size > 5_000


def test_ctrl_c(fake: Fake) -> None:
    """The report of what was measured so far, and the exit code of an interrupt."""
    fake.plan = lambda number: Plan(first=0.0 if number < 3 else 60.0)
    # whoever starts the tests in the background may have SIGINT ignored, which is inherited
    code = (
        "import signal, sys; from dllmserve.cli.main import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    args = ["bench", "serve", "--url", fake.url, "--rates", "20,30", "--duration", "60"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--warmup", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        limit = time.monotonic() + 60
        while len(fake.seen) < 6 and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert found["interrupted"] is True and len(found["results"]) == 1
    (result,) = found["results"]
    assert result["ok"] == 3 and result["unfinished"] >= 3 and result["failed"] == 0
    assert "interrupted: the last row is cut short" in out


BAD_VALUES = [
    (["--rates", "1,x"], "rate must be numbers > 0 or inf"),
    (["--rate", "0"], "rate must be numbers > 0"),
    (["--body", "{"], "body is not JSON"),
    (["--body", "[]"], "body must be a JSON object"),
    (["--header", "geheim"], "header must look like 'Name: value'"),
    (["--slo-first", "1", "--no-stream"], "slo_first needs a stream"),
    (["--slo-first", "1", "--endpoint", "native"], "slo_first needs a stream"),
    (["--endpoint", "native", "--stream"], "use --no-stream"),
    (["--endpoint", "other"], "endpoint must be one of"),
    (["--url", "localhost:8000"], "url must look like"),
    (["--url", "http://127.0.0.1:1"], "start one with: dllmserve serve"),
    (["--trace", "no/such/file"], "no/such/file: No such file or directory"),
    (["--trace", "x", "--rate", "1"], "rate and trace exclude each other"),
    (["--prompts", "no/such/file"], "no/such/file: No such file or directory"),
    (["--prompts", "{tmp}/empty.txt"], "holds no prompt"),
    (["--trace", "{tmp}/empty.txt"], "holds no request"),
    (["--records", "no/such/folder/x"], "no/such/folder/x: No such file or directory"),
    (["--records", "{tmp}"], "records must be a file"),
    (["--plot", "x.pdf"], "plot must be a file that ends in .png or .svg"),
    (["--rate", "inf", "--duration", "3"], "duration has no meaning"),
    (["--requests", "0"], "requests must be an integer in [1, 1000000]"),
    (["--api-key", "geheim\n"], "api_key must be printable ASCII"),
]


@pytest.mark.parametrize(("args", "message"), BAD_VALUES, ids=lambda v: " ".join(v)[:50])
def test_bad_values(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    args = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    assert main(["bench", "serve", *args]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err and "geheim" not in err


def test_missing_aiohttp(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for name in [name for name in sys.modules if name.startswith("dllmserve.tools.bench.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", "serve"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "extra 'bench'" in err and "'aiohttp>=" in err


def test_help_is_light() -> None:
    code = (
        "import sys; from dllmserve.cli.main import main; main(['bench', 'serve', '--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'aiohttp')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0
    for option in ("--rates", "--trace", "--slo-total", "--api-key", "--records", "--concurrency"):
        assert option in done.stdout
