"""The typer application: commands, help texts and what an error looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dllmserve import __version__
from dllmserve.cli.bench import bench
from dllmserve.cli.commands import Command, CommandGroup
from dllmserve.cli.convert import convert
from dllmserve.cli.eval import EPILOG as EVAL_EPILOG
from dllmserve.cli.eval import evaluate
from dllmserve.cli.generate import EPILOG, generate
from dllmserve.cli.info import info
from dllmserve.cli.serve import EPILOG as SERVE_EPILOG
from dllmserve.cli.serve import serve
from dllmserve.foreign import advice
from dllmserve.server.http.escape import shown

# the base of all usage errors; newer typer versions bring their own click
_USAGE_ERRORS: Any = tuple(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="dllmserve",
    cls=CommandGroup,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first look: [bold]dllmserve generate[/bold] (the embedded model, no download)",
)
app.command(cls=Command, epilog=EPILOG)(generate)
app.command(cls=Command, epilog=SERVE_EPILOG)(serve)
app.command("eval", cls=Command, epilog=EVAL_EPILOG)(evaluate)
app.command(cls=Command)(info)
app.command(cls=Command)(convert)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dllmserve {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=" ",
            callback=_print_version,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    """Generate text with diffusion and autoregressive language models, and serve them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


#: what an option takes, by the first word of the validator's name for an error
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}


def _wrong_value(error: Any) -> str | None:
    """What an option takes and got, where typer has only its validator's text."""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    kind = _KINDS.get(found[0]["type"].partition("_")[0]) if found else None
    if kind is None or error.param is None:
        return None
    option, given = max(error.param.opts, key=len), shown(repr(found[0]["input"]), 100)
    return f"{option} must be {kind}, got {given}"


def _usage_error(error: Any) -> str:
    """The error in one line; of an option that there is not, with the one that was meant."""
    if (wrong := _wrong_value(error)) is not None:
        return wrong
    name = getattr(error, "option_name", None)
    if name is None or type(error).__name__ != "NoSuchOption":
        return " ".join(str(error.format_message()).split())
    command = error.ctx.command if error.ctx is not None else None
    options = [o for p in getattr(command, "params", ()) for o in (*p.opts, *p.secondary_opts)]
    known = {o.lstrip("-").replace("-", "_"): o for o in options if o.startswith("--")}
    hint = advice(name, known, known.__getitem__) or "--help lists the options"
    return f"No such option: {shown(name, 100)}; {hint}"


def run(args: Sequence[str] | None = None) -> int:
    """Run the application and return the exit code; usage errors are one line."""
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=None if args is None else list(args),
            prog_name="dllmserve",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except _USAGE_ERRORS as error:
        typer.echo(f"error: {_usage_error(error)}", err=True)
        return int(error.exit_code)
    except typer.Abort:
        return 1
    except BrokenPipeError:
        # the reader went away (| head); without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
