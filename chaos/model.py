"""The model that is served: tiny, random, over bytes, so that a forward takes milliseconds."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import Shape, byte_tokenizer, write_random

#: prompt and answer together
MAX_MODEL_LEN = 4096


def write_model(folder: Path) -> Path:
    """Write a checkpoint with a byte tokenizer and a chat template; returns its folder."""
    shape = Shape(
        family="llada", vocab=260, mask_id=259, eos_ids=(256,), seed=9, max_len=MAX_MODEL_LEN
    )
    write_random(folder, shape)
    byte_tokenizer(folder, chat=True)
    return folder
