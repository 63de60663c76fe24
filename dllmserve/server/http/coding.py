"""Compressed request bodies: gzip and zstd, decoded to a bounded size."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any


def _found_zstd() -> Any:
    """Python's zstd; None if it was built without, or the extra "server" is not there."""
    try:
        return import_module(
            "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        )
    except ImportError:
        return None


zstd = _found_zstd()
#: largest window of a zstd frame, as a power of two: 8 MiB, the most that HTTP allows (RFC 9659)
_WINDOW_LOG = 23


class CodingError(Exception):
    """A body that cannot be decoded; the message is for the client."""


class DecodedTooLarge(Exception):
    """A body that becomes larger than it may."""


def decode(body: bytes, coding: bytes, most: int) -> bytes:
    """A body as it was before it was compressed.

    Args:
        body: as it came: one gzip member, or one zstd frame.
        coding: a key of :data:`CODINGS`.
        most: largest decoded size in bytes; no more than one byte above it is ever decoded.

    Raises:
        CodingError: it is something else, ends too early, or goes on behind its end.
        DecodedTooLarge: it is larger than that.
    """
    name = coding.decode()
    decoder = CODINGS[coding]()
    try:
        found: bytes = decoder.decompress(body, most + 1)
    except _ERRORS as error:
        raise CodingError(f"The request body is no valid {name}: {error}") from error
    if len(found) > most:
        raise DecodedTooLarge
    if not decoder.eof:
        raise CodingError(f"The request body ends inside of its {name} data.")
    if decoder.unused_data:
        raise CodingError(f"The request body goes on behind its {name} data; send one piece.")
    return found


def _gzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstd() -> Any:
    limit = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    return zstd.ZstdDecompressor(options=limit)


_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
#: decoders by the value of Content-Encoding
CODINGS: dict[bytes, Callable[[], Any]] = {b"gzip": _gzip}
if zstd is not None:
    CODINGS[b"zstd"] = _zstd
    _ERRORS += (zstd.ZstdError,)
