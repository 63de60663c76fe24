"""Rules for the head of a request that the parser leaves to the server."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import unquote

import httptools

from dllmserve.server.http.refusal import Refused

#: RFC 3986: reg-name or IPv4 address; IPv6 address or later in brackets; and a port
_AUTHORITY = re.compile(
    rb"(?:(?P<name>(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)"
    rb"|\[(?:(?P<v6>[0-9A-Fa-f:.]+)|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+)\])"
    rb"(?::(?P<port>[0-9]{0,5}))?"
)
_MAX_PORT = 65535


def check_head(version: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse a head that RFC 9112 forbids, or that this server does not speak.

    - Host (RFC 9112, section 3.2): once in HTTP/1.1, at most once in HTTP/1.0. It is an authority
      without a user, or empty. Clients send an empty Host when the target has no authority; nothing
      here depends on it. ``Host: :80`` has an empty name, so RFC 9110 (section 4.2.1) has it
      refused. An authority in the target has to keep the same rules.
    - Transfer-Encoding: ``chunked``, once. Everything else has been used to smuggle requests.

    Args:
        version: of HTTP, for example "1.1".
        target: as the client sent it.
        headers: names in lower case, and values.

    Raises:
        Refused: with status 400.

    Example:
        >>> check_head("1.1", b"/health", [(b"host", b"localhost:8000")])
    """
    if version not in ("1.0", "1.1"):
        raise Refused(400, "unsupported_http_version", "This server speaks HTTP/1.1 and HTTP/1.0.")
    hosts = [value.strip(b" \t") for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        many = "several Host headers" if hosts else "no Host header"
        raise _wrong_host(f"The request has {many}; send one.")
    if hosts and hosts[0] and not _is_authority(hosts[0]):
        raise _wrong_host("The Host header is not a name or an address, with or without a port.")
    if b"://" in target and not target.startswith(b"/"):
        rest = re.split(rb"[/?#]", target.partition(b"://")[2], maxsplit=1)
        if not _is_authority(rest[0]):
            raise _wrong_host("The host in the request's target is not a name or an address.")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and (len(codings) > 1 or codings[0].strip(b" \t").lower() != b"chunked"):
        text = "The only Transfer-Encoding is chunked, once; send the body uncompressed."
        raise Refused(400, "unsupported_transfer_encoding", text)


def path_of(target: bytes) -> str:
    """The path that uvicorn makes of a target, and that the application routes by.

    Raises:
        httptools.HttpParserInvalidURLError: there is none.
    """
    path = httptools.parse_url(target).path.decode("ascii")
    return unquote(path) if "%" in path else path


def _wrong_host(text: str) -> Refused:
    return Refused(400, "invalid_host", text)


def _is_authority(value: bytes) -> bool:
    """Whether bytes are a host that is not empty, with or without a port."""
    found = _AUTHORITY.fullmatch(value)
    if found is None or int(found["port"] or 0) > _MAX_PORT:
        return False
    if found["v6"] is not None:
        try:
            IPv6Address(found["v6"].decode())
        except AddressValueError:
            return False
    return True
