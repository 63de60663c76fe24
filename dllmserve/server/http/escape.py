"""Text from outside, made fit to be shown: no control characters, no unbounded length."""

from __future__ import annotations

import unicodedata

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(char: str) -> str:
    """One character as itself, or as a backslash escape if it is not printable."""
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    if char in _SHORT:
        return _SHORT[char]
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def escaped(text: str) -> str:
    r"""The text with every character that could steer a terminal or a parser written out.

    That is C0, C1 and DEL, line and paragraph separators, direction marks and lone
    surrogates. Spaces of all widths stay.

    Example:
        >>> escaped("a\r\nb")
        'a\\r\\nb'
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def shown(value: object, limit: int = 200) -> str:
    """A value as text for a message: escaped, and cut after ``limit`` characters.

    Bytes are read as Latin-1, so that each byte shows. Never raises.

    Example:
        >>> shown("abcdef", 3)
        'abc… (6 characters)'
    """
    if isinstance(value, (bytes, bytearray)):
        text = value.decode("latin-1")
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = str(value)
        except Exception:  # a __str__ that fails, an int of too many digits
            text = f"<{type(value).__name__}>"
    cut = escaped(text[:limit])
    return cut if len(text) <= limit else f"{cut}… ({len(text)} characters)"
