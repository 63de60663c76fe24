"""``dllmserve bench``: this engine on this machine, and any server from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllmserve.cli.bench_serve import EPILOG as SERVE_EPILOG
from dllmserve.cli.bench_serve import serve
from dllmserve.cli.commands import Command, CommandGroup, short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import (
    ENGINE,
    SAMPLING,
    SPARSE,
    Group,
    NamedModel,
    engine_config,
    one_model,
    sampling_params,
    with_options,
)
from dllmserve.cli.output import OUTPUT, picture, progress, show
from dllmserve.config import EngineConfig
from dllmserve.tools.bench.plot import plot_latency, plot_throughput
from dllmserve.tools.bench.workload import Workload
from dllmserve.tools.text import numbers

if TYPE_CHECKING:  # loads torch
    from dllmserve.tools.bench.report import Report
    from dllmserve.tools.bench.run import Bench, Result

DEFAULT_GEN_LENGTH = 128
DEFAULT_SEED = 0
DEFAULT_MODEL = "tiny"
#: timed runs of a request that runs alone
LATENCY_RUNS = 5

EPILOG = """
[bold]Examples[/bold]

dllmserve bench throughput -n 1,4,16 --cache dual

dllmserve bench throughput llada-8b --load-format dummy -n 1,16,64 --sparse --plot rates.png

dllmserve bench latency --unmask threshold --json
"""

_DECODING = replace(
    SAMPLING,
    help={"seed": "Seed of the prompts and of the requests."},
    # end ids are always ignored, and random prompts have no text to stop at
    skipped=SAMPLING.skipped | {"ignore_eos", "stop"},
    shown={**SAMPLING.shown, "gen_length": str(DEFAULT_GEN_LENGTH), "seed": str(DEFAULT_SEED)},
)
_ENGINE = replace(
    ENGINE,
    skipped=ENGINE.skipped | {"warmup"},  # which is runs that are not timed here
    help={
        "max_model_len": "Longest prompt + answer in tokens (what the workload needs, if not "
        "given).",
    },
)
_WORK = Group(Workload, "Options", skipped=frozenset({"params", "seed"}))
_ALONE = replace(
    _WORK, help={"runs": "Timed runs, one after the other."}, shown={"runs": str(LATENCY_RUNS)}
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Local directory, hub id, or tiny; llada-8b, illada-8b, dream-7b, sdar-4b, sdar-8b, "
        "fast-dllm-v2-7b, qwen3-8b, llada2-mini, llada-moe-7b, sdar-30b-a3b, qwen3-30b-a3b and "
        "diffusion-gemma-26b are the public checkpoints' shapes, for --load-format dummy. "
        "(default tiny)",
        show_default=False,
    ),
]
Requests = Annotated[
    str,
    typer.Option(
        "--requests",
        "-n",
        metavar="N,N,...",
        help="Requests submitted at once; each number is a row of the table.",
    ),
]
NoProfile = Annotated[
    bool,
    typer.Option(
        "--no-profile",
        metavar=" ",
        help="Leave out the profiled run, and with it the share of time with a kernel running.",
    ),
]

bench = typer.Typer(
    name="bench",
    cls=CommandGroup,
    help="Measure the engine on this machine, or a running server from outside.",
    rich_markup_mode="rich",
)


@bench.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure the engine on this machine, or a running server from outside."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


@bench.command(cls=Command, epilog=EPILOG)
@with_options(_WORK, OUTPUT, _DECODING, SPARSE, _ENGINE)
def throughput(
    model: ModelArgument = None,
    named: NamedModel = None,
    requests: Requests = "1",
    no_profile: NoProfile = False,
    **options: Any,
) -> None:
    """Output tokens per second with many requests at once.

    Prompts are random token ids, and end ids are ignored, so every answer is as long as
    --gen-length says. The last line is a JSON object with every figure.
    """
    with short_errors():
        counts = numbers("requests", requests, int, "integers >= 1")
        image = picture(options["plot"])
        report = _report(
            "throughput",
            one_model(model, named),
            options,
            lambda engine: [engine.throughput(count) for count in counts],
            profile=not no_profile,
        )
        show(report, options["json"])
        if image is not None:
            plot_throughput(report.results, report.title(), image)


@bench.command(cls=Command, epilog=EPILOG)
@with_options(_ALONE, OUTPUT, _DECODING, SPARSE, _ENGINE)
def latency(
    model: ModelArgument = None,
    named: NamedModel = None,
    no_profile: NoProfile = False,
    **options: Any,
) -> None:
    """Time of a request that runs alone, and until its first token.

    Prompts are random token ids, and end ids are ignored, so the answer is as long as
    --gen-length says. The last line is a JSON object with every figure.
    """
    with short_errors():
        image = picture(options["plot"])
        report = _report(
            "latency",
            one_model(model, named),
            {**options, "runs": LATENCY_RUNS if options["runs"] is None else options["runs"]},
            lambda engine: [engine.latency()],
            profile=not no_profile,
        )
        show(report, options["json"])
        if image is not None:
            plot_latency(report.results[0], report.title(), image)


bench.command(cls=Command, epilog=SERVE_EPILOG)(serve)


def _report(
    benchmark: str,
    model: str | None,
    options: Mapping[str, Any],
    measure: Callable[[Bench], list[Result]],
    *,
    profile: bool,
) -> Report:
    """Load the model, measure the device's ceilings, then the engine."""
    given = {**options, "ignore_eos": True}
    if given["gen_length"] is None and given["max_tokens"] is None:
        given["gen_length"] = DEFAULT_GEN_LENGTH
    if given["seed"] is None:
        given["seed"] = DEFAULT_SEED
    work = Workload(params=sampling_params(given), seed=given["seed"], **_WORK.given(options))
    config = engine_config(DEFAULT_MODEL if model is None else model, given, _ENGINE)
    with loading(config.model):
        from dllmserve.engine.machine import rank_threads, with_threads
        from dllmserve.engine.setup import plan_engine
        from dllmserve.llm import LLM
        from dllmserve.tools.bench.report import Report
        from dllmserve.tools.bench.roofline import measure_ceilings
        from dllmserve.tools.bench.run import Bench

        config = _fitting(config, work)
        plan = plan_engine(config)
        # before the engine takes the memory that this needs
        with with_threads(rank_threads(config, plan.device)):
            ceilings = measure_ceilings(plan.device, plan.dtype, plan.sizing.options.quantization)
        llm = LLM(**asdict(config))
    engine = Bench(llm, work, ceilings, profile=profile, progress=progress)
    return Report(benchmark, config, llm.plan, work, ceilings, measure(engine))


def _fitting(config: EngineConfig, work: Workload) -> EngineConfig:
    """The engine options, with an engine that is as long as the workload needs.

    It finds nothing of the run before, which had the same prompts.
    """
    from dllmserve.models.loader import find_model, read_config, read_spec, require_weights

    directory = find_model(config.model)
    if config.load_format != "dummy":
        require_weights(directory)  # before anything is measured
    config = replace(config, prefix_caching=False)
    if config.max_model_len is not None:
        return config
    spec = read_spec(read_config(directory), config)
    return replace(config, max_model_len=work.max_model_len(spec))
