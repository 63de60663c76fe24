"""A small random checkpoint with a byte-level tokenizer, and ways to run the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

GOLDEN = Path(__file__).parents[1] / "golden" / "dream-kv2of4"
EOS, MASK = 318, 319
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Run = Callable[..., subprocess.CompletedProcess[str]]


def _save_tokenizer(directory: Path) -> None:
    """One token per byte, 62 unused ones, and the two special ids of the golden model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"<unused{n}>" for n in range(EOS - len(letters)))]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<mask>"])
    assert tokenizer.token_to_id("<eos>") == EOS
    assert tokenizer.token_to_id("<mask>") == MASK
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def raw_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer but without a chat template."""
    directory = tmp_path_factory.mktemp("models") / "raw"
    directory.mkdir()
    shutil.copy(GOLDEN / "config.json", directory)
    shutil.copy(GOLDEN / "model.safetensors", directory)
    _save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(raw_checkpoint: Path) -> Path:
    """The same with a chat template."""
    directory = raw_checkpoint.parent / "chat"
    shutil.copytree(raw_checkpoint, directory)
    config = {"chat_template": TEMPLATE, "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of child processes: no settings of the person who runs the tests."""
    dropped = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "PYTHONIOENCODING")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> Run:
    """Run ``dllmserve`` in a process of its own, with standard input from a pipe."""

    def call(
        *args: str | Path, stdin: str | bytes = "", **more: str
    ) -> subprocess.CompletedProcess[str]:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        result = subprocess.run(
            [*COMMAND, *map(str, args)],
            input=given,
            capture_output=True,
            env={**environment, **more},
            timeout=120,
            check=False,
        )
        out, err = result.stdout.decode(), result.stderr.decode()
        return subprocess.CompletedProcess(result.args, result.returncode, out, err)

    return call


COMMAND = [
    sys.executable,
    "-c",
    "import sys; from dllmserve.cli.main import main; sys.exit(main())",
]
