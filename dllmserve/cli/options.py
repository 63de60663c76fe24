"""Command-line options made from the dataclasses, so that no field can be forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, TypeVar

import typer

from dllmserve._checks import listed_ids
from dllmserve._values import BLOCK_LENGTH
from dllmserve.config import EngineConfig
from dllmserve.errors import ConfigError, InvalidParameterError
from dllmserve.knobs import knobs, types
from dllmserve.presets import PRESETS
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig
from dllmserve.tools.evaluation.settings import DEFAULT_GEN_LENGTH, greedy

#: fields that only a fixed number of steps has, or for which a preset has no good values
_OF_FIXED_STEPS = ("steps", "steps_per_block", "remasking", "schedule", "eps", "confidence")

#: --model of every command
ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Local directory, hub id, or tiny.")
]
#: the same where a model is an argument
NamedModel = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="NAME", help="The same as MODEL.", show_default=False),
]

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: " "}


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Group:
    """The options of one dataclass.

    Attributes:
        kind: the dataclass.
        panel: headline in the help text.
        help: field name to help text, where it is not the knob's.
        names: fields whose option has another name, or a second one: "--rates -r".
        metavars: fields that are read from a text, and what the help calls it.
        lists: fields whose option may be repeated, and what the help calls one of its values.
        skipped: fields without an option.
        shown: field name to the default that the help text shows, where it is not the
            dataclass's own.
        flags: boolean fields that take no "--no-" form.
    """

    kind: type[Any]
    panel: str
    help: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    metavars: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    shown: Mapping[str, str] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    def option(self, name: str) -> str:
        """Python name of a field's option."""
        return self._names(name)[0].partition("/")[0].removeprefix("--").replace("-", "_")

    def parameters(self) -> list[inspect.Parameter]:
        """One keyword parameter per field, as typer reads them."""
        hints, known = types(self.kind), knobs(self.kind)
        found = []
        for item in fields(self.kind):
            if item.name in self.skipped:
                continue
            kind: Any = str if item.name in self.metavars else hints[item.name][0]
            metavar = self.metavars.get(item.name, _METAVARS.get(kind, "TEXT"))
            panel = known[item.name].panel if item.name in known else ""
            names = self._names(item.name)
            if kind is bool and item.name not in self.flags and "/" not in names[0]:
                names[0] += f"/--no-{names[0].removeprefix('--')}"
            declared = typer.Option(
                *names,
                help=self._help(item.name, item.default),
                # the real defaults stay with the dataclasses; _help() tells them
                show_default=False,
                metavar=self.lists.get(item.name, metavar),
                rich_help_panel=panel or self.panel,
                parser=_ids if kind == Sequence[int] else None,
            )
            if item.name in self.lists:
                kind = list[str]
            annotation = Annotated[kind | None, declared]
            option, place = self.option(item.name), inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(option, place, default=None, annotation=annotation))
        return found

    def given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that the user set, by field name."""
        names = [f.name for f in fields(self.kind) if f.name not in self.skipped]
        values = {name: options.get(self.option(name)) for name in names}
        # an absent flag is False and an absent list is empty in some typer versions
        unset = {name for name in self.flags if values.get(name) is False}
        for name, value in values.items():
            if value and isinstance(value, list) and isinstance(value[0], list):
                values[name] = [one for part in value for one in part]
        return {n: v for n, v in values.items() if v is not None and v != [] and n not in unset}

    def _help(self, name: str, default: Any) -> str:
        """Help text with the values to choose from and the default."""
        knob = knobs(self.kind).get(name)
        text = self.help.get(name, knob.help if knob else "")
        choices = knob.values() if knob else ()
        shown = self.shown.get(name, _shown(default))
        parts = [text] if text else []
        parts += [f"One of {', '.join(choices)}."] if len(choices) > 1 else []
        parts += [f"(default {shown})"] if shown else []
        return " ".join(parts)

    def _names(self, name: str) -> list[str]:
        return self.names.get(name, "--" + name.replace("_", "-")).split()


SAMPLING = Group(
    SamplingParams,
    "Decoding",
    # has options of its own
    skipped=frozenset({"sparse"}),
    shown={
        "temperature": "0",
        "max_tokens": "",
        "gen_length": str(DEFAULT_GEN_LENGTH),
        "steps": "one per token",
        "block_length": f"{BLOCK_LENGTH} with full attention, else the checkpoint's own",
    },
    flags=frozenset({"ignore_eos"}),
    metavars={"json_schema": "JSON"},
    lists={
        "stop": "TEXT",
        "logit_bias": "ID=VALUE",
        "stop_token_ids": "ID",
        "choice": "TEXT",
    },
)
SPARSE = Group(SparseConfig, "Sparse attention", names={"enabled": "--sparse"})
ENGINE = Group(
    EngineConfig,
    "Engine",
    # --seed is the request's
    names={"seed": "--engine-seed"},
    # declared by the commands themselves, with a short form
    skipped=frozenset({"model"}),
    flags=frozenset({"enforce_eager", "trust_remote_code", "prefix_isolation", "expert_parallel"}),
    lists={"eos_ids": "ID"},
)
#: of commands without the options of a request, whose --block-length would be another
ENGINE_ALONE = replace(
    ENGINE,
    names={**ENGINE.names, "default_block_length": "--default-block-length --block-length"},
)


def with_options(*groups: Group) -> Callable[[F], F]:
    """Give a command the options of the groups; they arrive in its ``**options``."""

    def wrap(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        made = [p for group in groups for p in group.parameters()]
        command.__signature__ = signature.replace(parameters=own + made)  # type: ignore[attr-defined]
        return command

    return wrap


def with_quality(group: Group, quality: str) -> Group:
    """A group of SamplingParams, for a command that decodes with a quality if none is given."""
    shown = {name: _shown(value) for name, value in PRESETS[quality].items()}
    shown.pop("block_length", None)  # a preset's is what SAMPLING says
    for name in {"cache", "suffix_window"} & shown.keys():  # other models leave them out
        shown[name] += " with full attention"
    return replace(group, shown={**group.shown, **shown, "quality": quality})


def chosen_quality(options: Mapping[str, Any], default: str) -> str | None:
    """The quality that was given, or the default, or None where one would be in the way.

    What is given beside a quality wins. But fixed steps and sparse attention are other ways to
    decode than a preset's, so they are taken as they are.
    """
    given = SAMPLING.given(options)
    if "quality" in given:
        return str(given["quality"])
    rule = given.get("unmask")
    fixed = rule == "steps" or (rule is None and any(n in given for n in _OF_FIXED_STEPS))
    return None if fixed or wants_sparse(options) else default


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from the command line, with the command line's defaults.

    They have a SparseConfig if one of its options was given.
    """
    given = SAMPLING.given(options)
    if wants_sparse(options):
        given["sparse"] = SparseConfig(**SPARSE.given(options))
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"])
    return greedy(given)


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model of a command that takes it as an argument or as --model, if it was given."""
    if argument is not None and option is not None:
        raise ConfigError("give MODEL or --model, not both")
    return option if argument is None else argument


def engine_config(model: str, options: Mapping[str, Any], group: Group = ENGINE) -> EngineConfig:
    """EngineConfig from the command line. Remote code runs only if asked for."""
    values = {"trust_remote_code": False, **group.given(options)}
    return EngineConfig(model=model, **values)


def wants_sparse(options: Mapping[str, Any]) -> bool:
    """True for --sparse and for any sparse option without --no-sparse."""
    given = SPARSE.given(options)
    return bool(given) and bool(given.get("enabled", True))


def _ids(text: str) -> list[int]:
    """One value of an option that takes token ids, and may be given several times."""
    try:
        return listed_ids(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no token id, and no list of some: 2,7") from error


def _logit_bias(pairs: list[str]) -> dict[int, float]:
    """The mapping that several ID=VALUE stand for."""
    bias: dict[int, float] = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            key, number = int(token), float(value)
        except ValueError as error:
            raise InvalidParameterError(
                f"--logit-bias takes ID=VALUE, for example 198=-100, got {pair!r}"
            ) from error
        if key in bias:
            raise InvalidParameterError(f"--logit-bias gives token id {key} twice")
        bias[key] = number
    return bias


def _shown(default: Any) -> str:
    """Default for the help text; nothing for None and for booleans."""
    if default is None or isinstance(default, bool):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)
