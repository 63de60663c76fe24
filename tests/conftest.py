"""Settings of the whole suite, and engines that tests share."""

import gc
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from dllmserve import LLM
from tests.checkpoints import (
    Shape,
    constant_logits,
    write,
    write_byte_model,
    write_random,
)
from tests.interpreter import quicken

if not torch.cuda.is_available():
    # before anything loads triton, which reads it once: kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        quicken()

settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is loaded by now stays; to look through it takes the collector a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end all may go, which libraries complain about otherwise."""
    gc.unfreeze()


Engines = Callable[..., LLM]

#: Random checkpoints by name; together they cover every option that weights depend on.
SHAPES = {
    "llada": Shape(family="llada"),
    "llada-odd": Shape(family="llada", heads=3, kv_heads=1, head_dim=6, extra_rows=5, mask_id=63),
    "llada-tied": Shape(family="llada", kv_heads=4, tied=True, extra_rows=3, seed=3),
    "llada-bias": Shape(family="llada", kv_heads=2, bias=True, mask_id=0, seed=4),
    "dream": Shape(family="dream", seed=5),
    "dream-odd": Shape(family="dream", heads=5, kv_heads=5, head_dim=6, seed=6),
    "dream-tied": Shape(family="dream", tied=True, seed=7),
    # a quarter of the vocabulary ends an answer
    "llada-eos": Shape(family="llada", eos_ids=tuple(range(10, 25)), seed=8),
}


@pytest.fixture(scope="session")
def engines() -> Engines:
    """LLM(path, device="cpu", **options), loaded once for all tests that ask for the same."""
    made: dict[Any, LLM] = {}

    def engine(path: Path, **options: Any) -> LLM:
        key = (str(path), tuple(sorted(options.items())))
        if key not in made:
            made[key] = LLM(str(path), device="cpu", **options)
        return made[key]

    return engine


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory of each random checkpoint of SHAPES; "dream-odd" has three shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_random(root / name, shape, shards=3 if name == "dream-odd" else 1)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaDA over bytes, with a tokenizer and a chat template."""
    return write_byte_model(tmp_path_factory.mktemp("bytes") / "byte-llada")


@pytest.fixture(scope="session")
def growing_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, block-causal, without and with a shift, and autoregressive; by family."""
    root = tmp_path_factory.mktemp("growing")
    return {name: write_byte_model(root / name, name) for name in ("sdar", "fast-dllm", "qwen3")}


@pytest.fixture(scope="session")
def constant_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[float]], Path]:
    """Checkpoints whose every masked position has the given logits; the last id is the mask."""
    root = tmp_path_factory.mktemp("constant")
    count = iter(range(1000))

    def make(logits: list[float]) -> Path:
        return write(root / str(next(count)), *constant_logits(logits))

    return make
