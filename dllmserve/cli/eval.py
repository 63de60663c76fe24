"""``dllmserve eval``: what settings of decoding cost in answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from dllmserve._checks import user_path
from dllmserve.cli.bench_output import picture, progress
from dllmserve.cli.exit_codes import INTERRUPTED
from dllmserve.cli.failure import short_errors
from dllmserve.cli.loading import loading
from dllmserve.cli.options import (
    ENGINE,
    SAMPLING,
    SPARSE,
    ModelOption,
    engine_config,
    sampling_params,
    wants_sparse,
    with_options,
)
from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError
from dllmserve.tools.bench.text import WIDTH
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
    Setting,
    check_names,
    describe,
    parse_setting,
    read_settings,
    suite,
)
from dllmserve.tools.evaluation.suites import SUITES

STDOUT = "-"
DEFAULT_MODEL = "tiny"
HELD_OUT_SOURCE = "held-out items of tiny"
SCORERS = "the tasks' scorers"

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
_ITEMS, _SETTINGS, _REPORT = "Items", "Settings", "Report"
#: what --replot may be combined with
_REPLOT = frozenset({"replot", "plot", "json_file"})


def _option(panel: str, metavar: str, text: str, *names: str) -> Any:
    return typer.Option(
        *names, metavar=metavar, help=text, rich_help_panel=panel, show_default=False
    )


More = Annotated[
    list[str] | None,
    typer.Argument(metavar="TASK", help="More tasks, as --tasks.", show_default=False),
]
Tasks = Annotated[
    list[str] | None,
    _option(
        _ITEMS,
        "TASK",
        "Tasks to answer; several with commas, or one after the other. A name before a hyphen "
        "stands for all of them: needle. (default all)",
        "--tasks",
        "-t",
    ),
]
Limit = Annotated[
    int | None, _option(_ITEMS, "N", "Items of each task, the first ones. (default all)")
]
Data = Annotated[
    str | None,
    _option(
        _ITEMS,
        "FILE",
        'Items from lines of JSON: {"prompt": text, "answer": text or list of texts}; also '
        "messages instead of prompt, task, gen_length, id. (default the embedded model's "
        "held-out items)",
    ),
]
Match = Annotated[
    str | None,
    _option(
        _ITEMS,
        "RULE",
        f"How answers to --data are judged: {', '.join(MATCHES)}. number compares the last "
        "numbers, or those after ####. (default exact)",
    ),
]
Raw = Annotated[
    bool, _option(_ITEMS, " ", "Send prompts as they are, without the chat template.", "--raw")
]
Given = Annotated[
    list[str] | None,
    _option(
        _SETTINGS,
        "TEXT",
        "'NAME: field=value field=value', on top of the options below; may be given several times.",
        "--setting",
        "-s",
    ),
]
File = Annotated[
    str | None,
    _option(_SETTINGS, "FILE", 'Settings from JSON: {"name": {"field": value}}.', "--settings"),
]
Suite = Annotated[
    str | None, _option(_SETTINGS, "NAME", f"A built-in list of settings: {', '.join(SUITES)}.")
]
Baseline = Annotated[
    str | None,
    _option(_SETTINGS, "NAME", "Setting that the others are compared with. (default the first)"),
]
PerStep = Annotated[
    int | None,
    _option(_SETTINGS, "N", "Tokens of a step, instead of --steps (with --unmask steps)."),
]
JsonFile = Annotated[
    str | None,
    _option(_REPORT, "FILE", "Write every figure as JSON; - is standard output, alone.", "--json"),
]
Plot = Annotated[
    str | None,
    _option(
        _REPORT, "FILE", "Draw accuracy against forwards: .png or .svg (needs the extra bench)."
    ),
]
Replot = Annotated[
    str | None, _option(_REPORT, "FILE", "Show and draw what --json has written; runs nothing.")
]
Answers = Annotated[
    str | None, _option(_REPORT, "FILE", "Write each answer, right or wrong, as a line of JSON.")
]
Quiet = Annotated[bool, _option(_REPORT, " ", "No progress on standard error.", "--quiet", "-q")]


@with_options(_DECODING, SPARSE, ENGINE)
def evaluate(
    context: typer.Context,
    more: More = None,
    model: ModelOption = DEFAULT_MODEL,
    tasks: Tasks = None,
    limit: Limit = None,
    data: Data = None,
    match: Match = None,
    raw: Raw = False,
    setting: Given = None,
    settings: File = None,
    suite: Suite = None,
    baseline: Baseline = None,
    tokens_per_step: PerStep = None,
    json_file: JsonFile = None,
    plot: Plot = None,
    replot: Replot = None,
    answers: Answers = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Measure what settings of decoding cost in answers.

    Answers the held-out items of the embedded model, or those of a file, with one setting or
    several, and compares accuracy, forward passes and speed with the first one's.
    """
    with short_errors():
        image = picture(plot)
        if replot is not None:
            _only_replot(context)
            with _opened(json_file) as file:
                _report(read_report(replot), file, image)
            return
        if json_file == answers == STDOUT:
            raise ConfigError("standard output takes --json or --answers, not both: name a file")
        base = _base(options, tokens_per_step)
        chosen = _settings(base, suite, settings, setting or ())
        job = _Job(
            config=engine_config(model, options),
            items=_items(data, match, raw, [*(tasks or ()), *(more or ())], limit),
            settings=chosen,
            baseline=find_baseline(chosen, baseline),
            data=(data or HELD_OUT_SOURCE, match or "exact" if data else SCORERS, limit),
            raw=raw,
            quiet=quiet,
        )
        with _opened(json_file) as file, _opened(answers) as lines:
            job.run(file, lines, image)


@dataclass(frozen=True)
class _Job:
    """The checked options of an evaluation."""

    config: EngineConfig
    items: list[Item]
    settings: list[Setting]
    baseline: str
    data: tuple[str, str, int | None]
    raw: bool
    quiet: bool

    def run(self, file: TextIO | None, lines: TextIO | None, image: Path | None) -> None:
        """Load the model, answer, report; also what was measured before an interrupt."""
        with loading(self.config.model):
            from dllmserve.llm import LLM

            llm = LLM(**asdict(self.config))
            evaluation = Evaluation(llm, self.items, raw=self.raw)
            evaluation.check(self.settings)
        measured = self._measured(evaluation)
        interrupted = len(measured) < len(self.settings)
        source, match, limit = self.data
        report = EvalReport(
            environment=environment_of(llm),
            data=data_of(source, self.items, match, limit, self.raw),
            items=[item.id for item in self.items],
            baseline=self.baseline,
            settings=summarise(measured, self.baseline),
            interrupted=interrupted,
        )
        if lines is not None:
            for line in answers_of(measured):
                lines.write(json.dumps(line, ensure_ascii=lines is sys.stdout) + "\n")
        _report(report, file, image, table=lines is not sys.stdout)
        if interrupted:
            raise typer.Exit(INTERRUPTED)

    def _measured(self, evaluation: Evaluation) -> list[Measured]:
        """The settings in their order; the baseline is measured first."""
        order = sorted(self.settings, key=lambda s: s.name != self.baseline)
        found: dict[str, Measured] = {}
        for number, setting in enumerate(order, 1):
            if not self.quiet and len(order) > 1:
                progress(f"{setting.name} ({number} of {len(order)})")
            try:
                bar = not self.quiet and sys.stderr.isatty()
                found[setting.name] = evaluation.run(setting, use_tqdm=bar)
            except KeyboardInterrupt:
                if not found:
                    raise
                break
        return [found[s.name] for s in self.settings if s.name in found]


def _base(options: dict[str, Any], tokens_per_step: int | None) -> Setting:
    """The setting that the options make, which the others build on."""
    # as parsed and checked there, but only what was given
    params = sampling_params(options)
    sampling = {name: getattr(params, name) for name in SAMPLING.given(options)}
    sparse = {name: v for name, v in SPARSE.given(options).items() if name != "enabled"}
    wanted = wants_sparse(options)
    base = Setting("options", sampling, sparse if wanted else None, tokens_per_step)
    return replace(base, name=describe(base))


def _settings(
    base: Setting, suite_name: str | None, file: str | None, given: Sequence[str]
) -> list[Setting]:
    """All settings of the run, the built-in ones first."""
    found = [] if suite_name is None else suite(suite_name, base)
    found += [] if file is None else read_settings(file, base)
    found += [parse_setting(text, base) for text in given]
    check_names(found)
    return found or [base]


def _items(
    data: str | None, match: str | None, raw: bool, tasks: Sequence[str], limit: int | None
) -> list[Item]:
    if data is None and match is not None:
        raise ConfigError(
            f"match={match!r} judges the items of --data FILE; the held-out ones have scorers"
        )
    found = held_out() if data is None else read_items(data, match or "exact", raw=raw)
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if models := [name for name in names if "/" in name or name == DEFAULT_MODEL]:
        raise ConfigError(f"{models[0]!r} is no task: a model is given by --model")
    return select(found, names, limit)


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
        typer.echo(report.header() + "\n")
        # wider than any table, which takes what it needs: a cell that is cut off is no use
        console = Console(highlight=False, emoji=False, width=2 * WIDTH)
        console.print(report.table())
    if image is not None:
        from dllmserve.tools.evaluation.plot import plot_report

        plot_report(report, image)


@contextmanager
def _opened(name: str | None) -> Iterator[TextIO | None]:
    """The file, before anything is measured, so that a wrong name costs nothing."""
    if name is None:
        yield None
    elif name == STDOUT:
        yield sys.stdout
    else:
        path = user_path(name)
        if path.is_dir():
            raise ConfigError(f"a file is needed, got the folder {name!r}")
        with path.open("w", encoding="utf-8") as file:
            yield file
