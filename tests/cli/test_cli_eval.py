"""``dllmserve eval``: tables, the record, pictures from it, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dllmserve import __version__
from dllmserve.cli import INTERRUPTED
from dllmserve.cli import eval as command
from dllmserve.cli.app import app
from dllmserve.cli.main import main
from dllmserve.cli.options import SAMPLING, SPARSE, sampling_params, with_options
from dllmserve.tools.evaluation.run import Evaluation
from tests.checkpoints import write_byte_model

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
FEW = ["--max-num-seqs", "8", "--max-model-len", "512", "--limit", "2"]
TWO = ["--setting", "careful: tokens_per_step=16", "-s", "fast: unmask=threshold cache=dual"]
RECORD = {
    "benchmark",
    "schema",
    "versions",
    "device",
    "dtype",
    "model",
    "options",
    "header",
    "data",
    "baseline",
    "settings",
    "items",
    "notes",
    "interrupted",
    "left_out",
}


def out_of(capfd: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main(["eval", *map(str, args)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_suites_on_a_block_causal_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = write_byte_model(tmp_path, "sdar")
    small = ("-m", model, "--max-num-seqs", "4", "--gen-length", "4", "-t", "word", "--limit", "1")
    record = tmp_path / "record.json"
    text = out_of(capfd, *small, "--suite", "frontier", "--json", record)
    assert "left out 'wino 0.6', 'wino 0.3': unmask='wino'" in " ".join(text.split())
    found = json.loads(record.read_text())
    assert len(found["left_out"]) == 2 and set(found["left_out"]) <= set(found["notes"])
    assert "left out 'wino" in out_of(capfd, "--replot", record)
    assert main(["eval", *map(str, small), "--suite", "caches"]) == 1
    error = capfd.readouterr().err
    assert "suite='caches' compares ways to approximate full attention, and " in error
    refused = ["--suite", "frontier", "--baseline", "wino 0.3"]
    assert main(["eval", *map(str, small), *refused]) == 1
    assert "setting 'wino 0.3': unmask='wino'" in capfd.readouterr().err


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_setting(capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--tasks", "word", "json", "--unmask", "threshold", "--threshold", "0.8", *FEW]
    lines = out_of(capfd, *args).splitlines()
    text = "\n".join(lines)
    for part in ("tiny (DreamModel)", "float32, torch", "4 items in 2 tasks, 2 a task", "scorers"):
        assert part in text
    assert "setting    threshold 0.8" in text
    assert all(len(line) <= 100 for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line and not line.startswith(" ")}
    assert rows["word"][1:3] == ["2", "100.0"] and rows["all"][1:3] == ["4", "100.0"]


def test_several_settings_and_replot(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, image, again = (tmp_path / name for name in ("eval.json", "eval.png", "again.svg"))
    args = ["--tasks", "word,listop", *FEW, *TWO, "--json", file, "--plot", image]
    table = out_of(capfd, *args)
    assert "1 careful" in table and "the baseline" in table and "accuracy, %" in table
    assert image.stat().st_size > 8000
    assert out_of(capfd, "--replot", file, "--plot", again) == table
    assert again.stat().st_size > 8000
    found = json.loads(file.read_text())
    assert set(found) == RECORD
    assert (found["benchmark"], found["schema"]) == ("eval", 1)
    assert found["versions"]["dllmserve"] == __version__
    careful, fast = found["settings"]
    assert careful["given"] == {"tokens_per_step": 16}
    assert careful["varies"] == {"gen_length": [32, 64], "steps": [2, 4]}
    assert (fast["sampling"]["unmask"], fast["sampling"]["cache"]) == ("threshold", "dual")
    gap = fast["overall"]["difference"]
    assert gap["low"] <= gap["value"] <= gap["high"] and len(fast["right"]) == 4
    assert found["data"]["tasks"] == {"word": 2, "listop": 2} and len(found["items"]) == 4
    assert json.loads(out_of(capfd, "--replot", file, "--json", "-")) == found


def _keys(value: Any) -> Iterator[str]:
    for key, inner in value.items():
        yield key
        if isinstance(inner, dict) and key not in (
            "given",
            "sampling",
            "sparse",
            "tasks",
            "varies",
        ):
            yield from _keys(inner)


def test_json_alone_and_documented(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"a": {"tokens_per_step": 16}, "b": {"sparse": {"retention_ratio": 0.5}}}')
    args = ["-t", "listop", *FEW, "--settings", file, "--baseline", "b", "--json", "-", "--quiet"]
    found = json.loads(out_of(capfd, *args, "--gen-length", "16", "--steps", "4"))
    assert found["baseline"] == "b"
    a, b = found["settings"]
    assert a["overall"]["difference"] is not None and b["overall"]["difference"] is None
    assert b["sampling"]["steps"] == 4 and b["sampling"]["gen_length"] == 16
    assert b["sparse"]["retention_ratio"] == 0.5 and a["sparse"] is None
    page = PAGE.read_text(encoding="utf-8")
    named = [*found, *found["data"], *_keys(a)]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_data(capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    data = write(
        tmp_path / "mine.jsonl",
        {"prompt": "Hi", "answer": "a"},
        {"messages": talk, "answer": ["a", "b"], "task": "talk", "gen_length": 4},
    )
    answers = tmp_path / "answers.jsonl"
    args = ["-m", checkpoint, "--data", data, "--gen-length", "8", "--answers", answers]
    assert "2 items in 2 tasks" in out_of(capfd, *args)
    first, second = (json.loads(line) for line in answers.read_text().splitlines())
    assert (first["task"], first["id"], second["task"]) == ("mine", "1", "talk")
    assert first["text"] == second["text"] and first["right"] is False
    assert first["answer"] == ["a"] and first["forward_passes"] <= 8
    # to standard output, instead of the table
    (line,) = out_of(capfd, *args[:-1], "-", "talk").splitlines()
    assert json.loads(line)["setting"] == "one token a step, gen_length 8"


def test_raw(capfd: pytest.CaptureFixture[str], raw_checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", {"prompt": "Hi", "answer": "a"})
    args = ["-m", str(raw_checkpoint), "--data", str(data), "--gen-length", "8"]
    assert "raw prompts" in " ".join(out_of(capfd, *args, "--raw").split())
    assert main(["eval", *args]) == 1
    assert "has no chat template: send the prompts as they are, by --raw" in capfd.readouterr().err


def test_the_options_are_those_of_generate() -> None:
    """Every setting starts from what the same options would be for dllmserve generate."""
    seen: list[dict[str, Any]] = []
    runner, own = CliRunner(), typer.Typer()

    @own.command()
    @with_options(SAMPLING, SPARSE)
    def parse(**options: Any) -> None:
        seen.append(options)

    for args in (
        [],
        ["--gen-length", "40"],
        ["--steps", "9", "--temperature", "0.5", "--seed", "3", "--stop", "a", "--stop", "b"],
        ["--unmask", "threshold", "--confidence", "neg_entropy", "--threshold", "-0.1"],
        ["--retention-ratio", "0.3", "--gen-length", "70"],
        ["--quality", "balanced"],
        ["--quality", "exact", "--gen-length", "48", "--block-length", "16"],
        ["--retention-ratio", "0.3", "--no-sparse", "--logit-bias", "7=-100"],
    ):
        assert runner.invoke(own, args).exit_code == 0
        base = command._base(seen[-1], None)
        assert base.params() == sampling_params(seen[-1])


def test_interrupted(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was measured before Ctrl-C is reported; the baseline comes first."""
    run, names = Evaluation.run, []

    def once(self: Evaluation, setting: Any, **more: Any) -> Any:
        names.append(setting.name)
        if len(names) > 1:
            raise KeyboardInterrupt
        return run(self, setting, **more)

    monkeypatch.setattr(Evaluation, "run", once)
    args = ["-t", "listop", *FEW, *TWO, "--baseline", "fast", "--json", "-"]
    assert main(["eval", *args]) == INTERRUPTED
    found = json.loads(capfd.readouterr().out)
    assert found["interrupted"] and [s["name"] for s in found["settings"]] == ["fast"]
    assert names == ["fast", "careful"]
    assert main(["eval", *args]) == INTERRUPTED
    out, err = capfd.readouterr()
    assert (out, err) == ("", "interrupted\n")


BAD_VALUES = [
    (["--tasks", "wrod"], "there is no task 'wrod'; did you mean 'word'?"),
    (["./LLaDA-8B"], "'./LLaDA-8B' is no task: a model is given by --model"),
    (["word", "nothing"], "there is no task 'nothing'"),
    (["--limit", "0"], "limit must be an integer >= 1, got 0"),
    (["--match", "exact"], "judges the items of --data FILE"),
    (["--data", "no/such/file"], "no/such/file: No such file"),
    (["--setting", "fast"], "a setting is 'NAME: field=value ...'"),
    (["--setting", "a: thresold=1"], "did you mean 'threshold'"),
    (["--setting", "a:", "--setting", "a:"], "two settings are named 'a'"),
    (["--settings", "no/such/file"], "no/such/file: No such file"),
    (
        ["--suite", "fronteer"],
        "suite must be one of 'frontier', 'caches', 'quality', got 'fronteer'",
    ),
    (["--suite", "frontier", "--baseline", "x"], "baseline must be one of the settings 'one"),
    (["--tokens-per-step", "0"], "tokens_per_step must be an integer >= 1, got 0"),
    (["--tokens-per-step", "2", "--steps", "3"], "exclude each other"),
    (["--unmask", "all"], "unmask must be one of"),
    (["--threshold", "2"], "threshold must be"),
    (["--plot", "picture.pdf"], "plot must be a file that ends in .png or .svg"),
    (["--json", "-", "--answers", "-"], "takes --json or --answers, not both"),
    (["--json", "."], "json must be a file, got the folder '.'"),
    (["--json", "no/such/folder/a.json"], "No such file or directory"),
    (["--replot", "no/such/file"], "no/such/file: No such file"),
    (["--replot", "a.json", "--limit", "3"], "give --plot and --json with it alone, not --limit"),
    (["--replot", "a.json", "word"], "not TASK"),
    (["--model", "no/such/model/here"], "no directory 'no/such/model/here'"),
    (["--sparse", "--cache", "dual", "--limit", "1"], "exclude each other"),
    (["--gen-length", "400", "--max-model-len", "256", "-t", "word"], "over max_model_len=256"),
]


@pytest.mark.parametrize(("args", "message"), BAD_VALUES, ids=lambda v: " ".join(v)[:50])
def test_bad_values(capfd: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert main(["eval", *args]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_bad_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "b"})
    assert main(["eval", "--data", str(data), "--match", "number"]) == 1
    assert capfd.readouterr().err.endswith('mine.jsonl:2: has no "answer"\n')


def test_missing_matplotlib(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["eval", "--plot", "a.png"]) == 1
    assert "pip install 'matplotlib>=" in capfd.readouterr().err


def test_help_and_replot_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dllmserve.cli.main import main; main(['eval', '--help']); "
        f"main(['eval', '--replot', {str(tmp_path / 'none.json')!r}]); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help() -> None:
    text = CliRunner().invoke(app, ["eval", "-h"], env={"COLUMNS": "100"}).output
    for option in ("--tasks", "--data", "--match", "--setting", "--suite", "--replot", "--cache"):
        assert option in text
    assert "frontier" in text and "the item's, or 64" in text
