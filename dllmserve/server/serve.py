"""Runs a server: opens the port, loads the model, serves, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import uvicorn

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError, DllmServeError
from dllmserve.server.app import classifier, create_app, running, start_logging
from dllmserve.server.config import ServerConfig
from dllmserve.server.http.listener import AT_ONCE, BACKLOG, GuardedServer
from dllmserve.server.http.refusal import RefusalHeaders, no_headers
from dllmserve.server.http.respond import Headers
from dllmserve.server.http.slots import ConnectionLimits, Connections
from dllmserve.server.jobs import Jobs
from dllmserve.server.private_files import remove_file, replace_file
from dllmserve.server.service import Service
from dllmserve.server.settings import Settings, with_port

_log = logging.getLogger("dllmserve.server")

#: seconds that answered connections get to be flushed and closed
_FLUSH_S = 5
#: least number of connection slots kept for probes and requests with a key; an eighth of
#: max_connections is kept if that is more
_RESERVE = 32
#: rounds of accepted connections that may still be open after they were told to close
_GOES = 4
#: open files besides connections: log, job store, engine, modules that are being read
_OTHER_FILES = 128


def serve(settings: Settings, began: float | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    0 is a clean end, 1 an engine that is gone for good.

    Args:
        settings: all options.
        began: monotonic seconds at which the program began; the time of jobs counts from there.

    Raises:
        ConfigError: the address is taken, the job store or a certificate cannot be used.
        DllmServeError: the model cannot be loaded.
    """
    server = settings.server
    start_logging(settings)
    bound = _bind(server.host, server.port)
    try:
        settings = with_port(settings, bound.getsockname()[1])
        with _address_file(settings.server):
            return asyncio.run(_Running(settings, bound, began).run())
    finally:
        bound.close()


class _Running:
    """One server, from its open port to its end."""

    def __init__(self, settings: Settings, bound: socket.socket, began: float | None) -> None:
        self._limits, self._at_once = _connection_limits(settings.server)
        # limited to the open files that there are; limits per key are computed from it
        server = replace(settings.server, max_connections=self._limits.max_connections)
        settings = replace(settings, server=server)
        self._settings, self._bound = settings, bound
        self._app = create_app(settings, began)
        self._service: Service = self._app.state.service
        self._jobs: Jobs = self._app.state.jobs
        self._server = self._make_server()
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        async with running(self._app) as loading:
            self._announce()
            serving = asyncio.create_task(self._server.serve(sockets=[self._bound]))
            try:
                return await self._until_the_end(loading)
            finally:
                self._service.refuse_new()
                await self._jobs.close()  # first, so that clients that wait for jobs get answers
                self._server.should_exit = True
                await asyncio.wait({serving}, timeout=2 * _FLUSH_S)
                serving.cancel()
                with suppress(asyncio.CancelledError):
                    await serving

    async def _until_the_end(self, loading: asyncio.Task[None]) -> int:
        """Serve until a signal, and drain; or until the engines are gone."""

        async def gone() -> DllmServeError:
            await loading
            return await self._service.watch()

        stopping, dying = asyncio.create_task(self._signals.get()), asyncio.create_task(gone())
        try:
            await asyncio.wait({stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._drain(stopping.result())
                return 0
            _log.critical("the server ends: %s", dying.result())
            return 1
        finally:
            stopping.cancel()
            dying.cancel()

    async def _drain(self, number: signal.Signals) -> None:
        """Finish what is under way; a second signal cuts that short."""
        timeout = self._settings.server.shutdown_timeout
        _log.info(
            "%s: finishing %d requests, for up to %g s; another signal ends them now",
            number.name,
            len(self._service.runs),
            timeout,
        )
        draining = asyncio.create_task(self._service.drain(timeout))
        again = asyncio.create_task(self._signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            await self._service.drain(0)
        again.cancel()

    def _announce(self) -> None:
        settings, server = self._settings, self._settings.server
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if ":" in server.host else server.host
        _log.info(
            "listening on %s://%s:%d, loading %s; %s; job ids are %s; jobs are kept in %s; "
            "quality is %s where a request says nothing of decoding",
            scheme,
            host,
            server.port,
            settings.model_name,
            f"{len(settings.keys)} API keys" if settings.keys else "no API keys",
            "sequential" if settings.sequential_ids else "random",
            "memory" if server.job_store == "memory" else "a file",
            server.default_quality,
        )

    def _make_server(self) -> GuardedServer:
        server = self._settings.server
        config = uvicorn.Config(
            self._app,
            http="httptools",
            ws="none",
            lifespan="off",  # it would load the model before the port is open
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=server.keep_alive_timeout,  # type: ignore[arg-type]
            timeout_graceful_shutdown=_FLUSH_S,
            ssl_certfile=server.ssl_certfile,
            ssl_keyfile=server.ssl_keyfile,
            ssl_ca_certs=server.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if server.ssl_ca_certs else ssl.CERT_NONE,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the TLS certificate or key cannot be used: {error}") from error
        connections = Connections(
            self._limits,
            self._service.connections,
            classify=classifier(self._settings),
            refusal_headers=_refusal_headers(server),
        )
        return GuardedServer(config, connections, self._at_once)


def _refusal_headers(server: ServerConfig) -> RefusalHeaders:
    """CORS headers for refusals below the application, so that pages can read them."""
    if not server.origins:
        return no_headers
    allowed = [origin.encode() for origin in server.origins]

    def readable(headers: Headers) -> Headers:
        named = [value.strip() for name, value in headers if name.lower() == b"origin"]
        # a single allowed origin is always named: browsers ignore it for other pages
        for origin in named or (allowed if len(allowed) == 1 else ()):
            if origin in allowed:
                return [(b"vary", b"Origin"), (b"access-control-allow-origin", origin)]
        return [(b"vary", b"Origin")]

    return readable


def _connection_limits(server: ServerConfig) -> tuple[ConnectionLimits, int]:
    """The configured limits, lowered if the system allows too few open files.

    Returns:
        The limits, and how many connections may be accepted in a row.
    """
    connections, at_once = server.max_connections, AT_ONCE
    reserve = max(_RESERVE, connections // 8)
    wanted = connections + reserve + _GOES * at_once + _OTHER_FILES
    files = _allow_files(wanted)
    if files < wanted:
        room = files - min(_OTHER_FILES, files // 2)
        reserve = min(reserve, room // 4)
        at_once = max(1, min(at_once, room // 32))
        connections = max(1, min(connections, room - reserve - _GOES * at_once))
    if connections < server.max_connections:
        _log.warning(
            "only %d files may be open, so max_connections is %d instead of %d: raise that limit "
            "(ulimit -n) to %d",
            files,
            connections,
            server.max_connections,
            wanted,
        )
    limits = ConnectionLimits(
        header_timeout_s=server.header_timeout,
        max_connections=connections,
        reserve=reserve,
        max_per_address=server.max_connections_per_address,
        write_timeout_s=server.write_timeout,
    )
    return limits, at_once


def _allow_files(count: int) -> int:
    """Raise the limit of open files to ``count``, if the system allows it; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


@contextmanager
def _address_file(server: ServerConfig) -> Iterator[None]:
    """Keep the address in its file while the server runs, if a file is configured."""
    if server.address_file is None:
        yield
        return
    path = user_path(server.address_file)
    try:
        written = replace_file(path, f"{address(server)}\n")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--address-file {path} cannot be written: {reason}") from error
    try:
        yield
    finally:
        remove_file(path, written)


def address(server: ServerConfig) -> str:
    """Where programs of this machine find the server.

    Example:
        >>> address(ServerConfig(host="0.0.0.0", port=9000, insecure_no_auth=True))
        'http://127.0.0.1:9000'
    """
    scheme = "https" if server.ssl_certfile else "http"
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}"


def _bind(host: str, port: int) -> socket.socket:
    """A listening address, taken before the model is loaded."""
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # bound sockets that do not listen may share an address; from here on clients can connect
        bound.listen(BACKLOG)
    except OSError as error:
        if bound is not None:
            bound.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; give another --port or --host"
        ) from error
    return bound
