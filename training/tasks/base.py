"""The item type, the held-out split and the scorer shared by all generators."""

from __future__ import annotations

import importlib.util
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_SCORING = Path(__file__).resolve().parents[2] / "dllmserve" / "assets" / "scoring.py"


def _load_scoring() -> ModuleType:
    """Load the package's scorer by path: importing the package itself would pull in the whole
    engine.
    """
    spec = importlib.util.spec_from_file_location("dllmserve_scoring", _SCORING)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {_SCORING}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score: Callable[[str, str, str, str], bool] = _load_scoring().score


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its answer; ``key`` is what decides whether it belongs to the held-out
    split.
    """

    task: str
    prompt: str
    answer: str
    key: str


Maker = Callable[[random.Random, int], Item]


def held(key: str) -> bool:
    """Whether a key belongs to the held-out sixteenth, never seen in training."""
    return zlib.crc32(key.encode()) % 16 == 0


def draw(make: Maker, rng: random.Random, level: int, want_held: bool) -> Item:
    """Draw items until one falls on the wanted side of the split.

    Args:
        make: The task's generator.
        rng: Source of randomness.
        level: Difficulty; only ``needle`` reads it (number of records).
        want_held: True for held-out items, False for training items.
    """
    while True:
        item = make(rng, level)
        if held(item.key) is want_held:
            return item
