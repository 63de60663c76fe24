"""Engines whose steps run as a capture of a CUDA graph would, where there is no GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllmserve import LLM


class Rehearsing:
    """A pool of graphs that runs the padded step, after its rehearsal, as a capture would."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    @property
    def replays(self) -> int:
        """Steps that ran so."""
        return len(self.shapes)

    def wanted(self, _: object) -> bool:
        """Every step."""
        return True

    def clear(self) -> None:
        """There is nothing captured."""

    def run(self, shape: Any, step: Callable[[], Any], rehearse: Callable[[], None]) -> Any:
        """Rehearse, then step."""
        self.shapes.append(shape)
        rehearse()
        return step()


def rehearsing(path: Path, *, depth: int | None = None, **options: Any) -> tuple[LLM, Rehearsing]:
    """An engine on Triton's attention, and its pool; ``depth``: steps in flight."""
    llm, pool = LLM(str(path), device="cpu", attention="triton", **options), Rehearsing()
    graphs: Any = pool
    llm._engine._runner.graphs = graphs
    if depth is not None:
        llm._engine._depth = depth
    return llm, pool
