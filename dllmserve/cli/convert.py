"""``dllmserve convert``: a GGUF file becomes an ordinary checkpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dllmserve._checks import user_path
from dllmserve.cli.commands import short_errors


def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file of a llama model.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where the checkpoint goes.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float16, bfloat16 or float32; unless given, float16 for quantized files.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar=" ", help="Replace a checkpoint that is there.")
    ] = False,
) -> None:
    """Turn a GGUF file into a directory that every command runs. Needs the extra gguf."""
    with short_errors():
        from dllmserve.models.gguf_convert import convert as write

        target = user_path(directory)
        written = write(user_path(file), target, dtype=dtype, force=force, report=_report)
        typer.echo(f"{target}: LlamaForCausalLM in {written}. Run it:")
        typer.echo(f"  dllmserve generate --model {target} Hello")


def _report(done: int, total: int) -> None:
    """A line that counts, to a terminal alone."""
    if sys.stderr.isatty():
        typer.echo(f"\r{done} of {total} tensors", err=True, nl=done == total)
