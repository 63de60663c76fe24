"""Words and numbers of the reports."""

from __future__ import annotations

import textwrap

#: columns of a header
WIDTH = 100
_INDENT = 11


def header_line(label: str, text: str) -> str:
    """One entry of a header, over as many lines as it needs."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=label.ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )


def rate_text(value: float) -> str:
    """Something per second, without digits that runs do not agree on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "timed run"), counted(3, "timed run")
        ('1 timed run', '3 timed runs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
