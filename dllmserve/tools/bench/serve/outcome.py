"""What became of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OK, REJECTED, UNFINISHED = "ok", "rejected", "unfinished"
#: what a server that is full answers; no failure, and told apart from one
REJECTIONS = frozenset({429, 503})


class RequestFailed(Exception):
    """A request did not get its answer.

    Attributes:
        kind: in a few words, to count by.
        message: what the server or the system said.
        status: of HTTP, if there was one.
        retry_after: whether the server said when to come back.
    """

    def __init__(
        self, kind: str, message: str, status: int | None = None, retry_after: bool = False
    ) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message = kind, message
        self.status, self.retry_after = status, retry_after


@dataclass(slots=True)
class Outcome:
    """One request; moments are in seconds of the event loop's clock.

    Attributes:
        index: number of the request in its row.
        scheduled: when it had to be sent.
        started: when the client got to it.
        sent: when it was handed to the connection.
        first_text: when its first text came.
        finished: when it ended, well or not.
        kind: "ok", "rejected", "unfinished", or how it failed.
        status: of HTTP.
        message: of the failure.
        retry_after: whether the server said when to come back.
        prompt_tokens, output_tokens, forward_passes: by the server's count.
        queue_seconds: by the server's clock.
        polled: whether the server had to be asked again and again.
    """

    index: int
    scheduled: float
    started: float
    sent: float | None = None
    first_text: float | None = None
    finished: float | None = None
    kind: str = UNFINISHED
    status: int | None = None
    message: str | None = None
    retry_after: bool = False
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    forward_passes: int | None = None
    queue_seconds: float | None = None
    polled: bool = False

    @property
    def failed(self) -> bool:
        """Whether there was an end that is neither an answer nor a rejection."""
        return self.kind not in (OK, REJECTED, UNFINISHED)

    @property
    def total(self) -> float | None:
        """Seconds from the scheduled arrival to the end."""
        return None if self.finished is None else self.finished - self.scheduled

    @property
    def first(self) -> float | None:
        """Seconds from the scheduled arrival to the first text."""
        return None if self.first_text is None else self.first_text - self.scheduled

    def fail(self, failure: RequestFailed) -> None:
        """Note how the request failed."""
        self.kind, self.status = failure.kind, failure.status
        self.message, self.retry_after = failure.message or None, failure.retry_after

    def record(self, start: float) -> dict[str, Any]:
        """For a file of records; moments are seconds since ``start``."""
        moments = {
            name: None if (at := getattr(self, name)) is None else round(at - start, 6)
            for name in ("scheduled", "started", "sent", "first_text", "finished")
        }
        names = ("kind", "status", "message", "retry_after", "prompt_tokens", "output_tokens")
        more = {name: getattr(self, name) for name in (*names, "forward_passes", "queue_seconds")}
        return {"index": self.index, **moments, **more}
