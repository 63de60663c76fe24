"""How a command fails: one line on stderr, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dllmserve.cli.exit_codes import FAILED, INTERRUPTED
from dllmserve.errors import DllmServeError


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
