"""How commands look and how they fail: help pages, one line on stderr, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse "--flag false", whose second word would be a prompt or the model."""
        flags = {
            name: (option.opts, option.secondary_opts)
            for option in self.params
            if getattr(option, "is_flag", False)
            for name in (*option.opts, *option.secondary_opts)
        }
        for name, word in pairwise(args):
            if name == "--":
                break
            if name not in flags or word.lower() not in ("true", "false"):
                continue
            on, off = flags[name]
            meant = on if (word.lower() == "true") is (name in on) else off
            form = f"give {max(meant, key=len)} alone" if meant else "leave it out"
            raise typer.BadParameter(
                f"it takes no value, got {word!r}: {form} (as an argument, it goes behind --)",
                param_hint=name,
            )
        return super().parse_args(ctx, args)


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
