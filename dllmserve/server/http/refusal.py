"""Refusals below the application: answers to requests and connections that do not reach it."""

from __future__ import annotations

from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from dllmserve.server.http.respond import CLOSE, Headers, error_body, error_type

#: finds further headers for a refusal, from the headers of the request that have arrived
RefusalHeaders = Callable[[Headers], Headers]


def no_headers(_: Headers) -> Headers:
    """The default: no further headers."""
    return ()


class Refused(Exception):
    """A request that is refused: status, code and message of the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def answer(self, headers: Headers = ()) -> bytes:
        """The whole response; the connection is closed after it.

        Args:
            headers: further headers, besides those that every refusal has.

        Example:
            >>> Refused(400, "malformed_request", "No.").answer().split()[1]
            b'400'
        """
        body = error_body(self.message, type=error_type(self.status), code=self.code)
        lines = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            CLOSE,
            *headers,
        ]
        if self.status in (429, 503):
            lines.append((b"retry-after", b"1"))
        return b"".join(
            [STATUS_LINE[self.status], *(b"%b: %b\r\n" % pair for pair in lines), b"\r\n", body]
        )
