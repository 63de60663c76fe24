"""The HTTP client of load tests: aiohttp, told to send each request once, as it is.

A client must cost less than the server that it measures. aiohttp takes 0.1 ms of CPU for a short
request, with 1 to 128 in flight, and 5 us for an event; httpx takes 0.5 to 6 ms for a request
(benchmarks/LOG.md).
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace

from dllmserve._needs import missing
from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve.outcome import RequestFailed

try:
    import aiohttp
except ImportError as error:
    raise ConfigError(missing("bench serve", "aiohttp", "bench")) from error

#: seconds that an idle connection is used again; servers close theirs after 5 or more
_MAX_IDLE = 2.0
#: kinds of failure
NO_CONNECTION, LOST, BAD_ANSWER = "no connection", "connection lost", "bad answer"


class Reply:
    """The answer to one request, filled in as it comes.

    Args:
        on_body: told the pieces of a body with status 200; without it, and with any other
            status, ``body`` collects them.

    Attributes:
        sent_at: when the request was handed to the connection; None before.
        status: of HTTP; 0 before it has come.
        headers: by name, in whatever case.
        body: see above.
        complete: whether the answer came to its end.
    """

    def __init__(self, on_body: Callable[[bytes], None] | None = None) -> None:
        self.sent_at: float | None = None
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self._on_body = on_body
        self._patience = asyncio.timeout(None)

    def end_in(self, seconds: float) -> None:
        """Wait for the end no longer than this; what came is then all there is."""
        self._patience.reschedule(asyncio.get_running_loop().time() + seconds)

    async def read(self, answer: aiohttp.ClientResponse) -> None:
        """Take the answer to its end."""
        self.status, self.headers = answer.status, answer.headers
        streamed = self._on_body is not None and self.status == 200
        take = self._on_body if self._on_body is not None and streamed else self.body.extend
        try:
            async with self._patience:
                async for piece in answer.content.iter_any():
                    take(piece)
                self.complete = True
        except TimeoutError:
            if not self._patience.expired():
                raise
            answer.close()


class HttpClient:
    """Sends requests to one server. Nothing is tried twice, and no redirect followed.

    To be made in the event loop that it is used in.

    Args:
        base: URL of the server, as :func:`dllmserve.tools.bench.serve.options.base_url` gives it.
        headers: sent with every request, by name in lower case.
    """

    def __init__(self, base: str, headers: Mapping[str, str]) -> None:
        self._base = base
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_note_sent)
        # the system's certificates; SSL_CERT_FILE adds others
        tls = ssl.create_default_context() if base.startswith("https:") else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_MAX_IDLE, ttl_dns_cache=None, ssl=tls
            ),
            headers={"accept-encoding": "identity", **headers},
            skip_auto_headers=("accept", "user-agent", "content-type"),
            timeout=aiohttp.ClientTimeout(total=None),  # callers have their own
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )
        # else a GET is sent again if its connection is lost, and nobody hears of that
        self._session._retry_connection = False

    async def exchange(self, method: str, path: str, body: bytes, reply: Reply) -> None:
        """Send a request and wait for the end of its answer.

        Raises:
            RequestFailed: no connection, or it was lost before an answer that is complete.
        """
        try:
            async with self._session.request(
                method,
                self._base + path,
                data=body or None,
                headers={"content-type": "application/json"} if body else None,
                allow_redirects=False,
                trace_request_ctx=reply,
            ) as answer:
                await reply.read(answer)
        except aiohttp.ClientError as error:
            raise _failure(error, reply.status or None) from error

    async def close(self) -> None:
        """End all connections."""
        await self._session.close()


async def _note_sent(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.sent_at = asyncio.get_running_loop().time()


def _failure(error: aiohttp.ClientError, status: int | None) -> RequestFailed:
    """What became of a request, in our words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return RequestFailed(NO_CONNECTION, _reason(error.os_error))
    if isinstance(error, aiohttp.ClientSSLError):
        return RequestFailed(NO_CONNECTION, str(error))
    if isinstance(error, aiohttp.ClientResponseError):
        return RequestFailed(BAD_ANSWER, f"not HTTP/1.1: {error.message}", status)
    reset = isinstance(error, OSError)
    return RequestFailed(LOST, "reset" if reset else "closed by the server", status)


def allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may: a connection is one."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reason(error: OSError) -> str:
    """The system's words, without the address that asyncio puts in their place."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return error.strerror or str(error)
    return os.strerror(error.errno)
