"""The model that is served: tiny, random, over bytes, so that a forward takes milliseconds."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import write_byte_model

#: prompt and answer together
MAX_MODEL_LEN = 4096


def write_model(folder: Path, family: str = "llada") -> Path:
    """Write a checkpoint with a byte tokenizer and a chat template; returns its folder."""
    return write_byte_model(folder, family, MAX_MODEL_LEN)
