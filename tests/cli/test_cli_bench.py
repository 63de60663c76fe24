"""``dllmserve bench``: what is printed, the record, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dllmserve import __version__
from dllmserve.cli.app import app
from dllmserve.cli.main import main
from dllmserve.tools.bench import roofline
from tests.checkpoints import write_byte_model

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
SMALL = ["--prompt-len", "12", "--gen-length", "8", "--runs", "2", "--max-num-seqs", "4"]
RECORD = {
    "benchmark",
    "schema",
    "versions",
    "device",
    "dtype",
    "model",
    "options",
    "memory",
    "ceilings",
    "notes",
    "results",
}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that take no time; their own test measures real ones."""
    monkeypatch.setitem(roofline._COPY_BYTES, "cpu", 4096)
    monkeypatch.setitem(roofline._MATRIX, "cpu", 32)


def lines(capfd: pytest.CaptureFixture[str], *args: str | Path) -> list[str]:
    assert main(["bench", *map(str, args)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def record(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    """The only line of a call with --json."""
    (line,) = lines(capfd, *args, "--json")
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(
    ("family", "options", "pace"),
    [
        ("sdar", [], "blocks of 4, 4 steps a block"),
        ("sdar", ["--steps-per-block", "1"], "blocks of 4, 1 step a block"),
        ("fast-dllm", ["--unmask", "dynamic"], "blocks of 8, dynamic"),
        ("qwen3", [], "blocks of 1, 1 step a block"),
    ],
)
def test_the_pace_that_is_shown_is_the_one_that_is_used(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    family: str,
    options: list[str],
    pace: str,
) -> None:
    model = write_byte_model(tmp_path, family)
    out = lines(capfd, "throughput", model, *SMALL, "--no-profile", *options)
    assert pace in " ".join("\n".join(out[:-1]).split())


def test_throughput(capfd: pytest.CaptureFixture[str]) -> None:
    out = lines(capfd, "throughput", "-n", "1,3", *SMALL, "--cache", "dual")
    assert all(len(line) <= 100 for line in out[:-1])
    text = "\n".join(out[:-1])
    for part in ("tiny (DreamModel)", "float32", "torch", "weights", "copy", "GB/s", "TFLOP/s"):
        assert part in text
    assert "prompt 12 + answer 8, blocks of 32, 8 steps, cache dual, temperature 0" in text
    assert [line.split()[0] for line in out[-4:-2]] == ["1", "3"]
    found = json.loads(out[-1])
    assert set(found) == RECORD
    assert (found["benchmark"], found["schema"]) == ("throughput", 2)
    assert found["versions"]["dllmserve"] == __version__
    assert [r["requests"] for r in found["results"]] == [1, 3]
    assert [r["output_tokens"] for r in found["results"]] == [8, 24]
    assert all(r["kernels"] is None and r["peak_allocated"] is None for r in found["results"])
    options = found["options"]
    assert options["limits"]["max_model_len"] == 256
    assert (options["prompt_len"], options["runs"], options["warmup"]) == (12, 2, 1)
    assert options["sampling"]["ignore_eos"] is True and options["sampling"]["steps"] == 8


def test_latency(capfd: pytest.CaptureFixture[str]) -> None:
    out = lines(capfd, "latency", *SMALL[:4], "--runs", "3")
    assert "3 timed runs" in "\n".join(out) and "first" in "\n".join(out)
    found = json.loads(out[-1])
    (result,) = found["results"]
    assert set(result["latency"]) == {"median", "p90", "max", "first_token"}
    assert len(result["seconds"]) == 3


def test_options_arrive(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    found = record(
        capfd,
        "throughput",
        checkpoint,
        *(*SMALL, "--retention-ratio", "0.3", "--delay-step", "2", "--no-head-select"),
        *("--temperature", "0.5", "--cfg-scale", "1", "--unmask", "threshold", "--threshold"),
        *("0.7", "--seed", "3", "--warmup", "0", "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--enforce-eager", "--max-model-len", "40", "-n", "3", "--no-profile"),
    )
    options = found["options"]
    assert options["sparse"]["retention_ratio"] == 0.3
    assert (options["sparse"]["delay_step"], options["sparse"]["head_select"]) == (2, False)
    sampling = options["sampling"]
    assert (sampling["unmask"], sampling["threshold"], sampling["seed"]) == ("threshold", 0.7, 3)
    assert (sampling["temperature"], sampling["cfg_scale"]) == (0.5, 1.0)
    assert (options["seed"], options["warmup"]) == (3, 0)
    engine = options["engine"]
    assert (engine["load_format"], engine["enforce_eager"]) == ("dummy", True)
    assert (found["dtype"], options["limits"]["max_model_len"]) == ("bfloat16", 40)
    assert found["model"]["name"] == str(checkpoint)
    note = "3 requests need 6 rows, over max_num_seqs=4: some wait for others"
    assert note in found["notes"]


def test_a_result_above_the_roofline_is_noted(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = roofline.Ceilings(1.0, 1.0, 1, 1)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *given: slow)
    (note,) = record(capfd, "latency", checkpoint, *SMALL)["notes"]
    assert note.startswith("1 requests ran above the roofline: the ceilings are too low")


def test_memory_adds_up(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    memory = record(capfd, "latency", "-m", checkpoint, *SMALL, "--warmup", "0")["memory"]
    parts = ("weights", "activations", "logits", "tables", "history", "pages")
    assert sum(memory[part] for part in parts) + memory.get("graphs", 0) == memory["planned"]


def _keys(value: Any) -> Iterator[str]:
    """Names of a result, those inside its parts included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)


def test_every_key_is_documented(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    found = record(capfd, "latency", checkpoint, *SMALL)
    page = PAGE.read_text(encoding="utf-8")
    named = [*found, *_keys(found["results"][0]), *found["ceilings"], *found["versions"]]
    named += [*found["options"], "share", "busy_seconds", "span_seconds"]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_plot(capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for command in ("throughput", "latency"):
        path = tmp_path / f"{command}.png"
        record(capfd, command, checkpoint, *SMALL, "--plot", path)
        assert path.stat().st_size > 10_000


BAD_VALUES = [
    (["throughput", "-n", "1,x"], "requests must be integers >= 1"),
    (["throughput", "-n", "0"], "requests must be integers >= 1"),
    (["throughput", "--runs", "0"], "runs must be an integer >= 1, got 0"),
    (["latency", "--warmup", "-1"], "warmup must be an integer >= 0, got -1"),
    (["latency", "--prompt-len", "0"], "prompt_len must be an integer >= 1, got 0"),
    (["latency", "--prompt-len", "5000"], "5128 tokens together, over the model's 2048"),
    (["latency", "--max-model-len", "64"], "over max_model_len=64"),
    (["latency", "--gen-length", "0"], "gen_length must be an integer in [1, 8192], got 0"),
    (["latency", "--steps", "0"], "steps must be"),
    (["latency", "--seed", "-1"], "seed must be"),
    (["latency", "--cache", "all"], "cache must be one of"),
    (["latency", "--sparse", "--cache", "dual"], "exclude each other"),
    (["latency", "--dtype", "int8"], "dtype must be one of"),
    (["latency", "--plot", "picture.pdf"], "plot must be a file that ends in .png or .svg"),
    (["latency", "--plot", "no/such/folder/a.png"], "no folder 'no/such/folder'"),
    (["latency", "no/such/model/here"], "no directory 'no/such/model/here'"),
    (["latency", "tiny", "--model", "tiny"], "give MODEL or --model, not both"),
    (["latency", "llada-8b"], "shapes of a public checkpoint without its weights"),
    (["throughput", "dream-7b", "--dtype", "bfloat16"], "load_format='dummy'"),
]


@pytest.mark.parametrize(("args", "message"), BAD_VALUES, ids=lambda v: " ".join(v)[:50])
def test_bad_values(capfd: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main(["bench", *args]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "args", [["latency", "--ignore-eos"], ["latency", "--stop", "a"], ["speed"], ["latency", "-n2"]]
)
def test_usage_errors(capfd: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert main(["bench", *args]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_missing_matplotlib(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "latency", "--plot", "a.png"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "extra 'bench'" in err and "pip install 'matplotlib>=" in err


def test_help() -> None:
    for args in (["bench"], ["bench", "--help"]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0
        assert all(name in result.output for name in ("throughput", "latency", "serve"))
    text = CliRunner().invoke(app, ["bench", "throughput", "-h"], env={"COLUMNS": "100"}).output
    for option in ("--requests", "--prompt-len", "--retention-ratio", "--kv-pages", "--no-profile"):
        assert option in text
    assert "--ignore-eos" not in text and "(default 128)" in text


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from dllmserve.cli.main import main; main(['bench', 'latency', '--help']); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
