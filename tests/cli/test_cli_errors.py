"""Errors are one line on stderr, usage errors included, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from typer.testing import CliRunner

from dllmserve import __version__
from dllmserve.cli.app import app
from dllmserve.cli.main import main

Run = Callable[..., CompletedProcess[str]]

BAD_VALUES = [
    (["--gen-length", "0"], "gen_length must be an integer in [1, 8192], got 0"),
    (["--temperature", "-1"], "temperature must be"),
    (["--temperature", "nan"], "temperature must be"),
    (["--unmask", "all"], "unmask must be one of 'steps'"),
    (["--cache", "sparse"], "cache"),
    (["--remasking", "random", "--unmask", "factor"], "remasking='random' works with"),
    (["--retention-ratio", "1.5"], "retention_ratio must be"),
    (["--sparse", "--cache", "dual"], "exclude each other"),
    (["--dtype", "int8"], "dtype must be one of"),
    (["--device", "tpu"], "device must be"),
    (["--tensor-parallel-size", "5"], "tensor_parallel_size=5"),
    (["--max-model-len", "100000"], "max_model_len=100000 is over"),
    (["--gen-length", "600"], "over max_model_len=512"),
    (["--gpu-memory-utilization", "0"], "gpu_memory_utilization must be"),
    (["--stop", ""], "stop strings must be non-empty"),
    (["--file", "no/such/file"], "no/such/file: No such file"),
    (["--model", "no/such/model/here"], "no directory 'no/such/model/here'"),
    (["--model", ""], "model must be"),
]


def _fails(capfd: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    code = main([str(a) for a in args])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return code, err


@pytest.mark.parametrize(
    ("args", "form"),
    [
        (["generate", "--prefix-caching", "false", "Hi"], "give --no-prefix-caching alone"),
        (["generate", "--no-prefix-caching", "FALSE", "Hi"], "give --prefix-caching alone"),
        (["generate", "Hi", "--raw", "True"], "give --raw alone"),
        (["generate", "--json", "false"], "leave it out"),
        (["eval", "-q", "true", "word"], "give --quiet alone"),
        (["serve", "--restart", "false"], "give --no-restart alone"),
        (["bench", "throughput", "--no-profile", "true"], "give --no-profile alone"),
    ],
)
def test_a_flag_takes_no_value(
    capfd: pytest.CaptureFixture[str], args: list[str], form: str
) -> None:
    """Its second word would be a prompt, a task or the model."""
    code, err = _fails(capfd, *args)
    assert code == 2
    assert "takes no value, got" in err and form in err


def test_a_prompt_may_be_what_a_flag_does_not_take(
    capfd: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    few = ("--gen-length", "4", "--model", checkpoint, "--json", "--", "true")
    assert main([str(a) for a in ("generate", *few)]) == 0
    assert json.loads(capfd.readouterr().out)["prompt"] == "true"


@pytest.mark.parametrize(("args", "message"), BAD_VALUES, ids=lambda v: " ".join(v)[:40])
def test_bad_values(
    capfd: pytest.CaptureFixture[str], checkpoint: Path, args: list[str], message: str
) -> None:
    code, err = _fails(capfd, "generate", "--model", checkpoint, "Hi", *args)
    assert code == 1
    assert message in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--tempeture", "1"], "--temperature"),
        (["generate", "--retention", "1"], "--retention-ratio"),
        (["generate", "--steps", "many"], "--steps"),
        (["generate", "--steps"], "--steps"),
        (["generat"], "generate"),
        (["--verison"], "--version"),
        (["info", "extra"], "extra"),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_usage_errors(capfd: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, err = _fails(capfd, *args)
    assert code == 2
    assert message in err


def test_no_tokenizer(capfd: pytest.CaptureFixture[str], raw_checkpoint: Path) -> None:
    bare = raw_checkpoint.parent / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((raw_checkpoint / "config.json").read_text())
    code, err = _fails(capfd, "generate", "-m", bare, "--load-format", "dummy", "Hi")
    assert code == 1 and "no tokenizer" in err
    code, err = _fails(capfd, "generate", "-m", bare, "Hi")
    assert code == 1 and ".safetensors" in err


def test_no_prompt_and_no_terminal(run: Run, checkpoint: Path) -> None:
    result = run("generate", "-m", checkpoint, stdin="")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no prompt")
    result = run("generate", "-m", checkpoint, stdin=b"caf\xe9")
    assert result.returncode == 1 and result.stderr.count("\n") == 1


def test_reader_goes_away(checkpoint: Path, environment: dict[str, str]) -> None:
    command = "dllmserve generate --help | head -n 1; exit ${PIPESTATUS[0]}"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, check=False
    )
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"dllmserve {__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(args: list[str]) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert "generate" in result.output and "info" in result.output


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    for option in ("--max-num-batched-tokens", "--gpu-memory-utilization", "--retention-ratio"):
        assert option in result.output  # in full, not cut off
    assert "Examples" in result.output


def test_help_needs_no_torch_and_is_quick(run: Run) -> None:
    begin = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - begin < 2  # about 0.3 s; the rest is for busy machines
    code = (
        "import sys; from dllmserve.cli.main import main; main(['generate', '--help']); "
        "sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    )
    import sys

    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_info(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert main(["info", "-m", str(checkpoint)]) == 0
    out = capfd.readouterr().out
    for part in ("DreamModel", __version__, "mask id", "319", "weights", "K,V pages", "pages"):
        assert part in out


def test_info_json(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    args = ["info", "-m", str(checkpoint), "--json", "--max-model-len", "256", "--dtype", "float16"]
    assert main(args) == 0
    facts = json.loads(capfd.readouterr().out)
    assert set(facts) == {"versions", "device", "model", "memory"}
    assert facts["model"]["max_model_len"] == 256
    assert facts["model"]["dtype"] == "float16"
    assert facts["model"]["eos_ids"] == [318]
    # K and V, 3 layers, 2 heads of 16, 2 bytes
    assert facts["memory"]["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 2
    parts = ("weights", "activations", "logits", "tables", "history", "pages")
    assert sum(facts["memory"][f"{p}_bytes"] for p in parts) == facts["memory"]["planned_bytes"]


def test_info_of_experts(capfd: pytest.CaptureFixture[str]) -> None:
    args = ["info", "-m", "llada2-mini", "--layers", "3", "--dtype", "bfloat16", "--json"]
    assert main([*args, "--load-format", "dummy", "--max-model-len", "256"]) == 0
    model = json.loads(capfd.readouterr().out)["model"]
    assert (model["experts"], model["experts_per_token"], model["expert_size"]) == (256, 8, 512)
    assert model["layers_with_experts"] == 2


def test_info_reads_no_weights(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    bare = checkpoint.parent / "info"
    bare.mkdir()
    (bare / "config.json").write_text((checkpoint / "config.json").read_text())
    assert main(["info", "-m", str(bare)]) == 0
    assert "tokenizer" in capfd.readouterr().out


@pytest.mark.parametrize("model", ["nosuch", "./nosuch", "no/such/directory", "~/nosuch/model"])
def test_a_server_does_not_listen_for_a_model_that_is_not_there(
    capfd: pytest.CaptureFixture[str], model: str
) -> None:
    assert main(["serve", model, "--port", "1"]) == 1  # a port that cannot be bound
    assert f"no directory '{model}'" in capfd.readouterr().err
