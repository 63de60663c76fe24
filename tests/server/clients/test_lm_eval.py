"""lm-eval against a server, unmodified and offline. Skipped where it is not installed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.clients.started import Started

TASK = Path(__file__).parents[3] / "examples" / "lm_eval"
LM_EVAL = shutil.which("lm_eval")


def score(server: Started, model: str, arguments: str, folder: Path, *more: str) -> float:
    """exact_match of the first four questions."""
    assert LM_EVAL is not None
    before = len(server.requests())
    command = [LM_EVAL, "run", "--model", model, "--model_args", f"model=tiny,{arguments}"]
    command += ["--tasks", "sort_numbers", "--include_path", ".", "--limit", "4"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [*command, "--output_path", str(folder / "out"), *more],
        cwd=TASK,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["sort_numbers"]["exact_match,none"]
    assert isinstance(found, float)
    assert {line["status"] for line in server.requests()[before:]} == {200}
    return found


@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed")
def test_local_chat_completions(server: Started, tmp_path: Path) -> None:
    url = f"base_url={server.url}/v1/chat/completions,num_concurrent=4"
    found = score(server, "local-chat-completions", url, tmp_path, "--apply_chat_template")
    assert found >= 0.75


@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed")
def test_local_completions(server: Started, tmp_path: Path) -> None:
    """Batches of bare prompts, which this model was not trained for."""
    url = f"base_url={server.url}/v1/completions,tokenizer_backend=None,tokenized_requests=False"
    found = score(
        server, "local-completions", url, tmp_path, "--batch_size", "2", "--gen_kwargs", "steps=4"
    )
    assert 0 <= found <= 1


def test_the_task_is_what_it_says() -> None:
    rows = [json.loads(line) for line in (TASK / "sort_numbers.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    for row in rows:
        numbers = sorted(int(word) for word in row["question"].split(": ")[1].split())
        assert row["answer"] == " ".join(map(str, numbers))
