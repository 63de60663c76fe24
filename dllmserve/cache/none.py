"""No cache: every step recomputes the whole canvas. Exact."""

from __future__ import annotations

from dllmserve.cache.policy import whole_canvas
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import Span, Store
from dllmserve.core.request import Request


class NoCache:
    """LLaDA's and Dream's own generation: one forward over everything per step."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """No K,V is kept, but where a rule scores written tokens, which reads the canvas's."""
        return request.canvas_len if request.revokes else 0

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """Always the whole canvas."""
        return whole_canvas(request, row, Store.POSITIONS if request.revokes else Store.NONE)

    def unsupported(self, spec: ModelSpec) -> list[str]:
        """Works with every model."""
        return []
