"""``dllmserve serve``: an HTTP server with the documented and OpenAI's API."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import dllmserve
from dllmserve._checks import user_path
from dllmserve._environment import forget_secrets
from dllmserve._needs import missing
from dllmserve.cli.commands import short_errors
from dllmserve.cli.options import ENGINE_ALONE, Group, NamedModel, one_model, with_options
from dllmserve.errors import ConfigError, ModelNotFoundError
from dllmserve.server.config import ServerConfig

EPILOG = """
Every option may also be an environment variable (DLLMSERVE_PORT=9000) or a line of the file
given by --config; the command line comes first, then the environment, then the file.

[bold]Examples[/bold]

dllmserve serve

dllmserve serve ./LLaDA-8B-Instruct --dtype bfloat16 --api-key-file keys.txt --host 0.0.0.0
"""

SERVER = Group(
    ServerConfig,
    "Server",
    flags=frozenset({"insecure_no_auth", "open_metrics", "log_prompts"}),
)


@with_options(SERVER, ENGINE_ALONE)
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Local directory, hub id, or tiny, the embedded model. (default tiny)",
            show_default=False,
        ),
    ] = None,
    named: NamedModel = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML file of options.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Serve a model over HTTP: OpenAI's API and submit-and-poll."""
    # the time of this process until now, without asking the system when it began
    began = time.monotonic() - time.process_time()
    with short_errors():
        given = SERVER.given(options)
        for name, value in ENGINE_ALONE.given(options).items():
            given["engine_seed" if name == "seed" else name] = value
        if (chosen := one_model(model, named)) is not None:
            given["model"] = chosen
        try:
            from dllmserve.server.serve import serve as run
            from dllmserve.server.settings import load_settings
        except ModuleNotFoundError as error:
            raise ConfigError(missing("the server", str(error.name), "server")) from error
        settings = load_settings(given, os.environ, config)
        forget_secrets()
        _check_path(settings.engine.model)
        code = run(settings, began)
    raise typer.Exit(code)


def _check_path(model: str) -> None:
    """Refuse a directory that is not there before the server listens, and not seconds later.

    The engine's process checks it too, and more; but it has to load torch first.

    Raises:
        ModelNotFoundError
    """
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    inside = Path(dllmserve.__file__).parent / "assets" / model
    if not (is_hub_id or inside.is_dir() or os.path.lexists(user_path(model))):
        raise ModelNotFoundError(
            f"no directory {model!r}; give a local directory, a hub id such as "
            "'GSAI-ML/LLaDA-8B-Instruct', or 'tiny' for the embedded model"
        )
