"""``dllmserve eval``: what settings of decoding cost in answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from dllmserve.cli import INTERRUPTED
from dllmserve.cli.commands import short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import (
    ENGINE,
    SAMPLING,
    SPARSE,
    Group,
    ModelOption,
    engine_config,
    sampling_params,
    wants_sparse,
    with_options,
)
from dllmserve.cli.output import STDOUT, opened, picture, progress, show_tables
from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError
from dllmserve.knobs import knob
from dllmserve.tools.evaluation.figures import Measured, summarise
from dllmserve.tools.evaluation.items import Item, held_out, read_items, select
from dllmserve.tools.evaluation.judge import MATCHES
from dllmserve.tools.evaluation.report import (
    EvalReport,
    answers_of,
    data_of,
    environment_of,
    read_report,
)
from dllmserve.tools.evaluation.run import Evaluation, find_baseline
from dllmserve.tools.evaluation.settings import (
    DEFAULT_GEN_LENGTH,
    OF_FULL_ATTENTION,
    SUITES,
    Setting,
    check_names,
    describe,
    parse_setting,
    read_settings,
    suite,
)

DEFAULT_MODEL = "tiny"
#: where the items come from, and how they are judged, without --data
_HELD_OUT = "held-out items of tiny", "the tasks' scorers"

EPILOG = """
[bold]Examples[/bold]

dllmserve eval --unmask threshold --limit 20

dllmserve eval --suite frontier --limit 50 --json frontier.json --plot frontier.png

dllmserve eval --tasks word --setting "careful:" --setting "fast: unmask=threshold threshold=0.6"

dllmserve eval -m GSAI-ML/LLaDA-8B-Instruct --data gsm8k.jsonl --match number --gen-length 256

dllmserve eval --replot frontier.json --plot frontier.svg
"""

_DECODING = replace(
    SAMPLING,
    shown={**SAMPLING.shown, "gen_length": f"the item's, or {DEFAULT_GEN_LENGTH}"},
)
_items, _settings, _output = (
    partial(knob, panel=panel) for panel in ("Items", "Settings", "Report")
)
#: what --replot may be combined with
_REPLOT = frozenset({"replot", "plot", "json"})


@dataclass(frozen=True)
class Options:
    """What is asked, with which settings, and what is written; the knobs say what each is."""

    tasks: tuple[str, ...] = _items(
        (),
        "Tasks to answer; several with commas, or one after the other. A name before a hyphen "
        "stands for all of them: needle. (default all)",
    )
    limit: int | None = _items(None, "Items of each task, the first ones. (default all)")
    data: str | None = _items(
        None,
        'Items from lines of JSON: {"prompt": text, "answer": text or list of texts}; also '
        "messages instead of prompt, task, gen_length, id. (default the embedded model's held-out "
        "items)",
    )
    match: str | None = _items(
        None,
        f"How answers to --data are judged: {', '.join(MATCHES)}. number compares the last "
        "numbers, or those after ####. (default exact)",
    )
    raw: bool = _items(False, "Send prompts as they are, without the chat template.")
    setting: tuple[str, ...] = _settings(
        (),
        "'NAME: field=value field=value', on top of the options below; may be given several times.",
    )
    settings: str | None = _settings(None, 'Settings from JSON: {"name": {"field": value}}.')
    suite: str | None = _settings(
        None,
        f"A built-in list of settings: {', '.join(SUITES)}; caches is for full attention. What the "
        "model has no use for is left out.",
    )
    baseline: str | None = _settings(
        None, "Setting that the others are compared with. (default the first)"
    )
    tokens_per_step: int | None = _settings(
        None, "Tokens of a step, instead of --steps (with --unmask steps)."
    )
    json: str | None = _output(None, "Write every figure as JSON; - is standard output, alone.")
    plot: str | None = _output(
        None, "Draw accuracy against forwards: .png or .svg (needs the extra bench)."
    )
    replot: str | None = _output(None, "Show and draw what --json has written; runs nothing.")
    answers: str | None = _output(None, "Write each answer, right or wrong, as a line of JSON.")
    quiet: bool = _output(False, "No progress on standard error.")


_METAVARS = {"match": "RULE", "suite": "NAME", "baseline": "NAME"}
_METAVARS |= dict.fromkeys(("data", "settings", "json", "plot", "replot", "answers"), "FILE")
OPTIONS = Group(
    Options,
    "Options",
    names={"tasks": "--tasks -t", "setting": "--setting -s", "quiet": "--quiet -q"},
    metavars=_METAVARS,
    lists={"tasks": "TASK", "setting": "TEXT"},
    shown={"tasks": "", "setting": ""},
    flags=frozenset({"raw", "quiet"}),
)
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="TASK", help="More tasks, as --tasks.", show_default=False),
]


@with_options(OPTIONS, _DECODING, SPARSE, ENGINE)
def evaluate(
    context: typer.Context, more: More = None, model: ModelOption = DEFAULT_MODEL, **options: Any
) -> None:
    """Measure what settings of decoding cost in answers.

    Answers the held-out items of the embedded model, or those of a file, with one setting or
    several, and compares accuracy, forward passes and speed with the first one's.
    """
    with short_errors(), ExitStack() as files:
        asked = Options(**OPTIONS.given(options))
        image = picture(asked.plot)
        if asked.replot is not None:
            _only_replot(context)
            file = files.enter_context(opened(asked.json, "json"))
            _report(read_report(asked.replot), file, image)
            return
        if asked.json == asked.answers == STDOUT:
            raise ConfigError("standard output takes --json or --answers, not both: name a file")
        settings = _chosen_settings(asked, options)
        baseline = find_baseline(settings, asked.baseline)
        config = engine_config(model, options)
        items = _chosen_items(asked, [*asked.tasks, *(more or ())])
        file = files.enter_context(opened(asked.json, "json"))
        lines = files.enter_context(opened(asked.answers, "answers"))
        evaluation = _evaluation(asked, config, items)
        settings, left_out = _fitting(evaluation, settings, asked.suite, baseline)
        measured = _measured(evaluation, settings, baseline, quiet=asked.quiet)
        interrupted = len(measured) < len(settings)
        source, match = (asked.data, asked.match or "exact") if asked.data else _HELD_OUT
        report = EvalReport(
            environment=environment_of(evaluation.llm),
            data=data_of(source, items, match, asked.limit, asked.raw),
            items=[item.id for item in items],
            baseline=baseline,
            settings=summarise(measured, baseline),
            interrupted=interrupted,
            left_out=left_out,
        )
        if lines is not None:
            for line in answers_of(measured):
                lines.write(json.dumps(line, ensure_ascii=lines is sys.stdout) + "\n")
        _report(report, file, image, table=lines is not sys.stdout)
        if interrupted:
            raise typer.Exit(INTERRUPTED)


def _evaluation(asked: Options, config: EngineConfig, items: list[Item]) -> Evaluation:
    """The items with the loaded model."""
    with loading(config.model):
        from dllmserve.llm import LLM

        return Evaluation(LLM(**asdict(config)), items, raw=asked.raw)


def _fitting(
    evaluation: Evaluation, settings: list[Setting], suite: str | None, baseline: str
) -> tuple[list[Setting], list[str]]:
    """The settings that mean something on the model, and which of the suite are left out.

    Raises:
        DllmServeError: the whole suite, the baseline, or a setting of the user's own is refused.
    """
    left_out: list[str] = []
    if suite is not None:
        if suite in OF_FULL_ATTENTION and evaluation.llm.spec.geometry != "full":
            raise ConfigError(
                f"suite={suite!r} compares ways to approximate full attention, and "
                f"{evaluation.llm.config.model!r} is no model of that kind: use another suite"
            )
        optional = SUITES[suite].keys() - {baseline}
        settings, left_out = evaluation.fitting(settings, optional)
    evaluation.check(settings)
    return settings, left_out


def _measured(
    evaluation: Evaluation, settings: list[Setting], baseline: str, *, quiet: bool
) -> list[Measured]:
    """The settings in their order; the baseline is run first."""
    found: dict[str, Measured] = {}
    told = progress if len(settings) > 1 and not quiet else lambda text: None
    bar = not quiet and sys.stderr.isatty()
    try:
        for one in evaluation.each(settings, baseline, told, use_tqdm=bar):
            found[one.setting.name] = one
    except KeyboardInterrupt:
        if not found:
            raise
    return [found[s.name] for s in settings if s.name in found]


def _base(options: Mapping[str, Any], tokens_per_step: int | None) -> Setting:
    """The setting that the options make, which the others build on."""
    # as parsed and checked there, but only what was given
    params = sampling_params(options)
    sampling = {name: getattr(params, name) for name in SAMPLING.given(options)}
    sparse = {name: v for name, v in SPARSE.given(options).items() if name != "enabled"}
    wanted = wants_sparse(options)
    base = Setting("options", sampling, sparse if wanted else None, tokens_per_step)
    return replace(base, name=describe(base))


def _chosen_settings(asked: Options, options: Mapping[str, Any]) -> list[Setting]:
    """All settings of the run, the built-in ones first."""
    base = _base(options, asked.tokens_per_step)
    found = [] if asked.suite is None else suite(asked.suite, base)
    found += [] if asked.settings is None else read_settings(asked.settings, base)
    found += [parse_setting(text, base) for text in asked.setting]
    check_names(found)
    return found or [base]


def _chosen_items(asked: Options, tasks: list[str]) -> list[Item]:
    data, match = asked.data, asked.match
    if data is None and match is not None:
        raise ConfigError(
            f"match={match!r} judges the items of --data FILE; the held-out ones have scorers"
        )
    found = held_out() if data is None else read_items(data, match or "exact", raw=asked.raw)
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if models := [name for name in names if "/" in name or name == DEFAULT_MODEL]:
        raise ConfigError(f"{models[0]!r} is no task: a model is given by --model")
    return select(found, names, asked.limit)


def _only_replot(context: typer.Context) -> None:
    """Raise ConfigError for an option that --replot would ignore."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or parameter.name in _REPLOT:
            continue
        name = parameter.opts[0] if parameter.param_type_name == "option" else "TASK"
        raise ConfigError(
            "--replot shows and draws what a file holds, and runs nothing: give --plot and "
            f"--json with it alone, not {name}"
        )


def _report(
    report: EvalReport, file: TextIO | None, image: Path | None, *, table: bool = True
) -> None:
    """Print tables, unless something else has standard output, and write what was asked for."""
    if file is not None:
        file.write(json.dumps(report.record()) + "\n")
    if table and file is not sys.stdout:
        show_tables(report)
    if image is not None:
        from dllmserve.tools.evaluation.plot import plot_report

        plot_report(report, image)
