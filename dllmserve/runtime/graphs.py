"""GraphPool: CUDA graphs of whole steps, captured when a shape comes back.

A graph replays a step's kernels with one call, so the host's work for a step no longer
depends on the number of layers. What a graph reads lies at fixed addresses: the packed
spans, the state table, the K,V pages. What it leaves is read before the next replay.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from dllmserve.runtime.platform import is_out_of_memory
from dllmserve.runtime.shape import StepShape
from dllmserve.runtime.tensors import StepOutputs

#: A shape seen this often gets a graph: one that never returns is not worth the capture.
CAPTURE_AT = 2
#: Steps for which no graph is captured after one ran out of memory.
PAUSE = 256


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    outputs: StepOutputs


class GraphPool:
    """Graphs by shape, all in one memory pool; the least recently used are dropped.

    Args:
        limit: graphs kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._graphs: OrderedDict[StepShape, _Captured] = OrderedDict()
        self._seen: OrderedDict[StepShape, int] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._paused = 0
        self.captures = 0
        self.replays = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def wanted(self, shape: StepShape) -> bool:
        """Count a use of ``shape``; True if it has a graph or is worth one."""
        if shape in self._graphs:
            return True
        if self._paused:
            self._paused -= 1
            return False
        seen = self._seen.pop(shape, 0) + 1
        self._seen[shape] = seen
        if len(self._seen) > 16 * self._limit:
            self._seen.popitem(last=False)
        return seen >= CAPTURE_AT

    def run(
        self, shape: StepShape, step: Callable[[], StepOutputs], rehearse: Callable[[], None]
    ) -> StepOutputs:
        """Replay the shape's graph, capturing it first if need be.

        Args:
            shape: key.
            step: runs the step on what lies in the step's buffers; called once, to capture.
            rehearse: runs the same kernels once without effect, so that all of them are
                compiled and loaded before the capture.

        Raises:
            RuntimeError: the capture failed, for want of memory for example. The step has
                had no effect, and can be run without a graph.
        """
        captured = self._graphs.get(shape)
        if captured is None:
            try:
                rehearse()
                captured = self._capture(step)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    self._paused = PAUSE
                raise
            self._graphs[shape] = captured
            self._seen.pop(shape, None)
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        captured.graph.replay()
        self.replays += 1
        return captured.outputs

    def clear(self) -> None:
        """Drop all graphs and what is known of shapes.

        With the last graph goes what its pool of memory hangs on, so the next ones get another.
        """
        self._paused = 0
        self._graphs.clear()
        self._seen.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, step: Callable[[], StepOutputs]) -> _Captured:
        # not torch.cuda.graph(): it collects garbage and empties the allocator's cache on
        # every capture, which costs more than the capture
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with _without_collection(), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = step()
            except BaseException:
                with suppress(RuntimeError):  # says once more that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self.captures += 1
        return _Captured(graph, outputs)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from collecting: to free another engine's graphs is an error in a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
