"""dllmserve: an engine that serves diffusion language models.

Example:
    >>> from dllmserve import LLM, SamplingParams
    >>> llm = LLM()
    >>> messages = [{"role": "user", "content": "Copy: red green blue"}]
    >>> params = SamplingParams(temperature=0.0, gen_length=16, steps=16)
    >>> outputs = llm.chat(messages, params, use_tqdm=False)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dllmserve._system import refuse_windows  # which notes from now on what forks inherit
from dllmserve.cores import passive_waiting

if TYPE_CHECKING:
    from dllmserve._values import SparseConfig
    from dllmserve.async_llm import AsyncLLM
    from dllmserve.holes import Hole
    from dllmserve.llm import LLM
    from dllmserve.outputs import CanvasStep, RequestOutput
    from dllmserve.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CanvasStep",
    "Hole",
    "RequestOutput",
    "SamplingParams",
    "SparseConfig",
    "__version__",
]

# resolved on first use, so that "import dllmserve" does not load torch
_LAZY = {
    "LLM": "dllmserve.llm",
    "AsyncLLM": "dllmserve.async_llm",
    "CanvasStep": "dllmserve.outputs",
    "Hole": "dllmserve.holes",
    "RequestOutput": "dllmserve.outputs",
    "SamplingParams": "dllmserve.sampling_params",
    "SparseConfig": "dllmserve._values",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        if name in ("LLM", "AsyncLLM"):
            refuse_windows()
        with passive_waiting():  # what is behind some names loads torch
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
