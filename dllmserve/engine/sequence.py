"""ModelType, which the original dLLM-Serve has here, is not needed: this module says so."""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    if name == "ModelType":
        raise ImportError(
            "there is no ModelType: the checkpoint's config.json says what model it is, so leave "
            "the import and its uses out"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
