"""Words, numbers, headers and tables of the reports, and files of lines."""

from __future__ import annotations

import gzip
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from dllmserve._checks import user_path
from dllmserve.errors import ConfigError
from dllmserve.sampling_params import SamplingParams

#: columns of a header
WIDTH = 100
_INDENT = 11

_T = TypeVar("_T")
_Number = TypeVar("_Number", int, float)


def header(lines: Mapping[str, str], notes: Iterable[str] = ()) -> str:
    """Entries of a header below each other, each over as many lines as it needs."""
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=label.ljust(_INDENT),
            subsequent_indent=" " * _INDENT,
            break_on_hyphens=False,
        )
        for label, text in [*lines.items(), *(("note", note) for note in notes)]
    )


def table(
    rows: Sequence[Iterable[tuple[str, str]]], *, left: str = "", gap: int = 0, total: bool = False
) -> Table:
    """Lines of cells, each with the name of its column.

    Args:
        rows: at least one; all have the same columns, whose names may repeat.
        left: name of the column that is flush left; the others are flush right.
        gap: blanks between columns, besides one.
        total: the last row stands apart.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, gap, 0, 0))
    lines = [list(row) for row in rows]
    for name, _ in lines[0]:
        made.add_column(name, justify="left" if name == left else "right", no_wrap=True)
    for number, line in enumerate(lines, 1):
        if total and 1 < number == len(lines):
            made.add_section()
        made.add_row(*(Text(cell) for _, cell in line))
    return made


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte order mark; a ``.gz`` is unpacked.

    Raises:
        ConfigError: it is no UTF-8 text.
        OSError: the file cannot be read.
    """
    file = user_path(path)
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            return str(lines.read())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that holds something; raises as :func:`read_text`."""
    # not splitlines(): a text may hold form feeds and Unicode line separators
    lines = enumerate(read_text(path).split("\n"), 1)
    yield from ((number, line) for number, line in lines if line.strip())


def rate_text(value: float) -> str:
    """Something per second, without digits that runs do not agree on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def known(value: _T | None, form: Callable[[_T], str], unknown: str = "-") -> str:
    """A figure in a cell, which may be missing."""
    return unknown if value is None else form(value)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "timed run"), counted(3, "timed run")
        ('1 timed run', '3 timed runs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rule_text(params: SamplingParams) -> str:
    """The unmask rule, with the number that has its name.

    Example:
        >>> rule_text(SamplingParams(unmask="threshold")), rule_text(SamplingParams(steps=8))
        ('threshold 0.9', '8 steps')
    """
    value = getattr(params, params.unmask, None)
    if params.unmask == "steps" and params.steps_per_block is not None:
        return f"{counted(params.steps_per_block, 'step')} a block"
    if params.unmask == "steps":
        return f"{value} steps"
    return params.unmask if value is None else f"{params.unmask} {value:g}"


def numbers(name: str, text: str, kind: type[_Number], what: str) -> list[_Number]:
    """Numbers above 0 from a comma list.

    Args:
        name: of the option, for errors.
        text: the list.
        kind: int or float.
        what: the list must be.

    Raises:
        ConfigError: the text is no such list.

    Example:
        >>> numbers("requests", "1,16,64", int, "integers >= 1")
        [1, 16, 64]
    """
    try:
        # int alone would let through digits of other scripts, and 1_000
        found = [kind(part if part.isascii() else "") for part in text.replace("_", "x").split(",")]
    except ValueError:
        found = []
    if not found or not all(value > 0 for value in found):  # so that "nan" is refused too
        raise ConfigError(f"{name} must be {what} with commas between, such as 1,2,4, got {text!r}")
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    """The value below which so many percent lie, between two of them if need be.

    Args:
        values: at least one.
        percent: 1 to 99.

    Example:
        >>> percentile([5.0, 1.0, 2.0, 4.0, 3.0], 90)
        4.6
    """
    several = [*values, *values[: len(values) == 1]]
    return statistics.quantiles(several, n=100, method="inclusive")[percent - 1]
