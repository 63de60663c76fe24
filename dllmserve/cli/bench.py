"""``dllmserve bench``: this engine on this machine, and any server from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllmserve.cli.bench_output import AsJson, Plot, picture, progress, show
from dllmserve.cli.bench_serve import EPILOG as SERVE_EPILOG
from dllmserve.cli.bench_serve import serve
from dllmserve.cli.commands import Command, CommandGroup
from dllmserve.cli.failure import short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import (
    ENGINE,
    SAMPLING,
    SPARSE,
    NamedModel,
    engine_config,
    one_model,
    sampling_params,
    with_options,
)
from dllmserve.config import EngineConfig
from dllmserve.tools.bench.plot import plot_latency, plot_throughput
from dllmserve.tools.bench.workload import Workload, parse_counts

if TYPE_CHECKING:  # loads torch
    from dllmserve.tools.bench.report import Report
    from dllmserve.tools.bench.run import Bench, Result

DEFAULT_PROMPT_LENGTH = 256
DEFAULT_GEN_LENGTH = 128
DEFAULT_SEED = 0
DEFAULT_MODEL = "tiny"

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
    help={
        "max_model_len": "Longest prompt + answer in tokens (what the workload needs, if not "
        "given).",
    },
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Local directory, hub id, or tiny; llada-8b and dream-7b are the public "
        "checkpoints' shapes, for --load-format dummy. (default tiny)",
        show_default=False,
    ),
]
PromptLength = Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt.")]
Warmup = Annotated[
    int, typer.Option(metavar="N", help="Runs that are not timed, before the others.")
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
@with_options(_DECODING, SPARSE, _ENGINE)
def throughput(
    model: ModelArgument = None,
    named: NamedModel = None,
    requests: Annotated[
        str,
        typer.Option(
            "--requests",
            "-n",
            metavar="N,N,...",
            help="Requests submitted at once; each number is a row of the table.",
        ),
    ] = "1",
    prompt_len: PromptLength = DEFAULT_PROMPT_LENGTH,
    runs: Annotated[int, typer.Option(metavar="N", help="Timed runs; medians are reported.")] = 3,
    warmup: Warmup = 1,
    as_json: AsJson = False,
    plot: Plot = None,
    no_profile: NoProfile = False,
    **options: Any,
) -> None:
    """Output tokens per second with many requests at once.

    Prompts are random token ids, and end ids are ignored, so every answer is as long as
    --gen-length says. The last line is a JSON object with every figure.
    """
    with short_errors():
        counts = parse_counts(requests)
        image = picture(plot)
        job = _Job(one_model(model, named), prompt_len, runs, warmup, options)

        def measure(engine: Bench) -> list[Result]:
            return [engine.throughput(count) for count in counts]

        report = job.report("throughput", measure, profile=not no_profile)
        show(report, as_json)
        if image is not None:
            plot_throughput(report.results, report.title(), image)


@bench.command(cls=Command, epilog=EPILOG)
@with_options(_DECODING, SPARSE, _ENGINE)
def latency(
    model: ModelArgument = None,
    named: NamedModel = None,
    prompt_len: PromptLength = DEFAULT_PROMPT_LENGTH,
    runs: Annotated[int, typer.Option(metavar="N", help="Timed runs, one after the other.")] = 5,
    warmup: Warmup = 1,
    as_json: AsJson = False,
    plot: Plot = None,
    no_profile: NoProfile = False,
    **options: Any,
) -> None:
    """Time of a request that runs alone, and until its first token.

    Prompts are random token ids, and end ids are ignored, so the answer is as long as
    --gen-length says. The last line is a JSON object with every figure.
    """
    with short_errors():
        image = picture(plot)
        job = _Job(one_model(model, named), prompt_len, runs, warmup, options)

        def measure(engine: Bench) -> list[Result]:
            return [engine.latency()]

        report = job.report("latency", measure, profile=not no_profile)
        show(report, as_json)
        if image is not None:
            plot_latency(report.results[0], report.title(), image)


bench.command(cls=Command, epilog=SERVE_EPILOG)(serve)


class _Job:
    """The checked options of a benchmark; the model is loaded by :meth:`report`."""

    def __init__(
        self, model: str | None, prompt_len: int, runs: int, warmup: int, options: dict[str, Any]
    ) -> None:
        given = {**options, "ignore_eos": True}
        for name, default in (("gen_length", DEFAULT_GEN_LENGTH), ("seed", DEFAULT_SEED)):
            named = name == "gen_length" and given["max_tokens"] is not None
            if given[name] is None and not named:
                given[name] = default
        params = sampling_params(given)
        self._workload = Workload(
            prompt_len=prompt_len,
            params=params,
            seed=given["seed"],
            runs=runs,
            warmup=warmup,
        )
        self._config = engine_config(DEFAULT_MODEL if model is None else model, given)

    def report(
        self, benchmark: str, measure: Callable[[Bench], list[Result]], *, profile: bool
    ) -> Report:
        """Load, measure the ceilings, then the engine."""
        with loading(self._config.model):
            from dllmserve.engine.setup import plan_engine
            from dllmserve.engine.threads import rank_threads, with_threads
            from dllmserve.llm import LLM
            from dllmserve.tools.bench.report import Report
            from dllmserve.tools.bench.roofline import measure_ceilings
            from dllmserve.tools.bench.run import Bench

            config = self._fitting()
            plan = plan_engine(config)
            # before the engine takes the memory that this needs
            with with_threads(rank_threads(config, plan.device)):
                ceilings = measure_ceilings(plan.device, plan.dtype)
            llm = LLM(**asdict(config))
        engine = Bench(llm, self._workload, ceilings, profile=profile, progress=progress)
        return Report(benchmark, config, llm.plan, self._workload, ceilings, measure(engine))

    def _fitting(self) -> EngineConfig:
        """The engine options, with an engine that is as long as the workload needs."""
        from dllmserve.models.loader import find_model, read_config, read_spec, require_weights

        config = self._config
        directory = find_model(config.model)
        if config.load_format != "dummy":
            require_weights(directory)  # before anything is measured
        if config.max_model_len is not None:
            return config
        spec = read_spec(read_config(directory))
        return replace(config, max_model_len=self._workload.max_model_len(spec))
