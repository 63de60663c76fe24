"""Server-sent events out of the pieces that a connection delivers."""

from __future__ import annotations

_BOM = b"\xef\xbb\xbf"


class SseParser:
    r"""Finds the data of events. Comments, names and ids are dropped.

    Lines may end in LF, CR LF or CR, and pieces may be cut anywhere.

    Example:
        >>> parser = SseParser()
        >>> parser.feed(b": keep-alive\r\n\r\ndata: on"), parser.feed(b"e\ndata: two\n\n")
        ([], [b'one\ntwo'])
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that the piece completes; lines of one event are joined by LF."""
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]  # the second half of a CR LF
        self._after_cr = piece.endswith(b"\r")
        # splits at LF, CR LF and CR and, unlike the one of str, nowhere else
        lines = (self._rest + piece).splitlines()
        whole = not lines or piece.endswith((b"\n", b"\r"))
        self._rest = b"" if whole else lines.pop()
        events = []
        for line in lines:
            if not self._begun:
                self._begun, line = True, line.removeprefix(_BOM)
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line == b"data":
                self._data.append(b"")
        return events
