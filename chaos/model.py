"""The models that are served: tiny, random, over bytes, so that a forward takes milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import write_byte_model

#: prompt and answer together
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        family: of the checkpoint.
        fields: of every request, but those with sparse attention.
        grows: its requests get K,V pages as they go, and may lose them.
        options: of every server.
    """

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    grows: bool = False
    options: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write a checkpoint with a byte tokenizer and a chat template; returns its folder."""
        return write_byte_model(folder, self.family, MAX_MODEL_LEN)


#: enough for one of the longest requests, so that those that run together lose theirs
_FEW_PAGES = ("--kv-pages", "40", "--page-size", "8")
#: streams of models with blocks give text block by block at the latest
_BLOCKS = {"block_length": 8}
KINDS: Mapping[str, Kind] = {
    "full": Kind("llada", _BLOCKS),
    "block-causal": Kind("sdar", _BLOCKS, True, _FEW_PAGES),
    "autoregressive": Kind("qwen3", {}, True, _FEW_PAGES),
}
