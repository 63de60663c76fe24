"""How commands look and how they fail: help pages, one line on stderr, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dllmserve.cli import FAILED, INTERRUPTED
from dllmserve.errors import DllmServeError


class _Help:
    """Shows ``--help`` as an option without a value; typer would call it <bool>."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = " "
        return option


class Command(_Help, TyperCommand):
    """A command."""


class CommandGroup(_Help, TyperGroup):
    """A command with commands below it."""


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn errors into one line on stderr and exit code 1, Ctrl-C into exit code 130."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (DllmServeError, OSError) as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from error


def _one_line(error: Exception) -> str:
    text = str(error)
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.strerror:
        # without the "[Errno 2]" that helps nobody
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())
