"""Settings: named ways of decoding that one run compares, and suites: built-in lists of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dllmserve._checks import check_choice, check_int, check_known
from dllmserve._stepwise import stepwise
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.validator import settled, window_of
from dllmserve.errors import ConfigError, DllmServeError, InvalidParameterError
from dllmserve.knobs import types
from dllmserve.presets import PRESETS
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig
from dllmserve.tools.text import read_text, rule_text

#: sets ``steps`` from the length of each answer, or ``steps_per_block`` from that of a block
TOKENS_PER_STEP = "tokens_per_step"
#: turns sparse attention on or off, or holds fields of SparseConfig
SPARSE = "sparse"

#: what a setting has unless it says otherwise, as on the rest of the command line
DEFAULT_GEN_LENGTH = 64
DEFAULT_TEMPERATURE = 0.0

#: fields that say how many forwards write an answer
PACES = frozenset({"steps", "steps_per_block"})
#: fields of SamplingParams that a setting may have
SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams) if f.name != SPARSE)
#: names of the answer's length among them
LENGTHS = frozenset({"gen_length", "max_tokens"})
SPARSE_FIELDS = tuple(f.name for f in fields(SparseConfig) if f.name != "enabled")

#: a field, and its value unless that is JSON
_FIELD = re.compile(r"""([\w.-]+)=(?:'([^']*)'|([^\s\[{"]\S*))?""")


@dataclass(frozen=True)
class Setting:
    """One way of decoding, for items of any length.

    Attributes:
        name: in tables and pictures.
        sampling: fields of SamplingParams that were given; ``gen_length`` or ``max_tokens``
            among them is the length of every item's answer.
        sparse: fields of SparseConfig that were given; None without sparse attention.
        tokens_per_step: with ``unmask="steps"``, tokens that a step writes, at most.
        spec: of a model that fills block after block; None is one with full attention.

    Raises:
        DllmServeError: a field has a wrong value; the message names the setting.

    Example:
        >>> Setting("fast", {"unmask": "steps"}, tokens_per_step=4).params(64).steps
        16
    """

    name: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    sparse: Mapping[str, Any] | None = None
    tokens_per_step: int | None = None
    spec: ModelSpec | None = None

    def __post_init__(self) -> None:
        check_known(f"setting {self.name!r}", self.sampling, SAMPLING_FIELDS)
        try:
            if (count := self.tokens_per_step) is not None:
                check_int(InvalidParameterError, TOKENS_PER_STEP, count, 1)
                if given := sorted(PACES & self.sampling.keys()):
                    raise InvalidParameterError(
                        f"{given[0]} and tokens_per_step={count} exclude each other: give one of "
                        "them"
                    )
            self.params(DEFAULT_GEN_LENGTH)
        except DllmServeError as error:
            raise named(error, self.name) from error

    def params(self, gen_length: int | None = None) -> SamplingParams:
        """How an item is decoded.

        Args:
            gen_length: of the item; the setting's own comes first.
        """
        given = dict(self.sampling)
        if self.sparse is not None:
            given["sparse"] = SparseConfig(**self.sparse)
        params = greedy(given, gen_length, self.tokens_per_step)
        if self.tokens_per_step is not None and params.unmask != "steps":
            raise InvalidParameterError(
                f"tokens_per_step={self.tokens_per_step} works with unmask='steps' only, "
                f"got unmask={params.unmask!r}"
            )
        if self.spec is None or self.tokens_per_step is None:
            return params
        block = settled(params, self.spec).resolved_block_length
        if window_of(self.spec, params) == 1:  # the last block ends with the answer
            block = min(block, params.gen_length)
        return replace(params, steps_per_block=-(-block // self.tokens_per_step))

    def on(self, spec: ModelSpec) -> Setting:
        """The setting as the model reads it.

        With full attention that is the setting itself. Models with another geometry take their pace
        block by block, so ``tokens_per_step`` sets ``steps_per_block``.
        """
        if self.tokens_per_step is None or spec.geometry == "full":
            return self
        return replace(self, spec=spec)

    def given(self) -> dict[str, Any]:
        """The setting as :func:`make_setting` takes it, and as JSON can hold it."""
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in self.sampling.items()}
        if self.tokens_per_step is not None:
            found[TOKENS_PER_STEP] = self.tokens_per_step
        if self.sparse is not None:
            found[SPARSE] = dict(self.sparse)
        return found


def greedy(
    given: Mapping[str, Any], gen_length: int | None = None, tokens: int | None = None
) -> SamplingParams:
    """Parameters as the command line makes them of what was given.

    Args:
        given: fields of SamplingParams.
        gen_length: if none of them is the length; None is 64.
        tokens: see :func:`dllmserve._stepwise.stepwise`.
    """
    length = DEFAULT_GEN_LENGTH if gen_length is None else gen_length
    own = {} if LENGTHS & given.keys() else {"gen_length": length}
    return stepwise({"temperature": DEFAULT_TEMPERATURE, **own, **given}, tokens)


def named(error: DllmServeError, name: str) -> DllmServeError:
    """The error with the name of the setting that it is about."""
    return type(error)(f"setting {name!r}: {error}")


def make_setting(name: str, values: Mapping[str, Any], base: Setting | None = None) -> Setting:
    """A setting from the fields that somebody gave.

    Args:
        name: of the setting.
        values: fields of SamplingParams and SparseConfig, ``tokens_per_step``, and ``sparse``:
            true, false or an object with fields of SparseConfig. Any of the latter implies it.
        base: the setting that the fields change; None is one without any.

    Raises:
        UnknownOptionError: a name is not known; the message says which one is nearest.
        DllmServeError: a value is wrong.

    Example:
        >>> make_setting("half", {"unmask": "threshold", "retention_ratio": 0.5}).sparse
        {'retention_ratio': 0.5}
    """
    if not name.strip():
        raise ConfigError("a setting needs a name that is not empty")
    known = (*SAMPLING_FIELDS, TOKENS_PER_STEP, SPARSE, *SPARSE_FIELDS)
    if not isinstance(values, Mapping):
        raise ConfigError(f"setting {name!r} must be an object of fields, got {values!r}")
    check_known(f"setting {name!r}", values, known)
    own = {k: v for k, v in values.items() if k != SPARSE}
    try:
        sparse = _sparse(values.get(SPARSE), own, base.sparse if base is not None else None)
    except DllmServeError as error:
        raise named(error, name) from error
    per_step = own.pop(TOKENS_PER_STEP, None)
    sampling = {k: v for k, v in own.items() if k in SAMPLING_FIELDS}
    if isinstance(bias := sampling.get("logit_bias"), Mapping):
        # the names of a JSON object are texts
        sampling["logit_bias"] = {int(k) if _is_id(k) else k: v for k, v in bias.items()}
    inherited = dict(base.sampling) if base is not None else {}
    if LENGTHS & set(sampling):
        inherited = {k: v for k, v in inherited.items() if k not in LENGTHS}
    if per_step is not None or PACES & set(sampling):
        inherited = {k: v for k, v in inherited.items() if k not in PACES}
    elif base is not None and not {"unmask", "quality"} & set(sampling):
        per_step = base.tokens_per_step
    return Setting(name, {**inherited, **sampling}, sparse, per_step)


def _is_id(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()


def _sparse(
    given: Any, own: Mapping[str, Any], base: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Fields of the SparseConfig, or None where there is none."""
    single = {k: v for k, v in own.items() if k in SPARSE_FIELDS and k not in SAMPLING_FIELDS}
    if given is False:
        if single:
            raise ConfigError(f"sparse=false and {next(iter(single))} exclude each other")
        return None
    if isinstance(given, Mapping):
        check_known("sparse", given, ("enabled", *SPARSE_FIELDS))
        inner = dict(given)
        if inner.pop("enabled", True) is False:
            return None
        single = {**inner, **single}
    elif given not in (None, True):
        raise ConfigError(
            f"sparse must be true, false or an object with fields of SparseConfig, got {given!r}"
        )
    if given is None and not single:
        return None if base is None else dict(base)
    return {**(base or {}), **single}


def parse_setting(text: str, base: Setting | None = None) -> Setting:
    """A setting from ``"NAME: field=value field=value ..."``.

    Values are those of the command line; one with spaces is quoted, lists and objects are
    JSON. ``sparse.`` may stand before a field of SparseConfig.

    Raises:
        DllmServeError: it is not of that form, or a field is wrong.

    Example:
        >>> parse_setting("fast: unmask=threshold threshold=0.8").params(32).threshold
        0.8
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon or not name:
        raise ConfigError(
            "a setting is 'NAME: field=value ...', for example "
            f"'fast: unmask=threshold threshold=0.8', got {text!r}"
        )
    values: dict[str, Any] = {}
    try:
        for key, value in _pairs(rest):
            key = key.replace("-", "_").removeprefix(f"{SPARSE}.")
            if key in values:
                raise ConfigError(f"{key} is given twice")
            values[key] = _typed(key, value) if isinstance(value, str) else value
    except DllmServeError as error:
        raise named(error, name) from error
    return make_setting(name, values, base)


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    """Each field with its value: a text, or what its JSON stands for."""
    rest = text.strip()
    while rest:
        if (head := _FIELD.match(rest)) is None:
            raise ConfigError(f"needs field=value, got {rest.split()[0]!r}")
        key, quoted, plain = head.groups()
        value, end = plain or "" if quoted is None else quoted, head.end()
        if quoted is None and not plain and rest.startswith(("[", "{", '"'), end):
            value, size = _decode(rest[end:], key)
            end += size
        if rest[end : end + 1].strip():
            raise ConfigError(f"{key} goes on with {rest[end:].split()[0]!r} behind its value")
        yield key, value
        rest = rest[end:].lstrip()


def _typed(key: str, text: str) -> Any:
    """A value of the field's type; what is none stays a text, which the field then refuses."""
    (kind, optional), lower = _TYPES.get(key, (str, False)), text.lower()
    if optional and lower in ("none", "null"):
        return None
    if kind is bool and lower in ("true", "false"):
        return lower == "true"
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ; json alone would keep the last one."""
    names = [key for key, _ in pairs]
    if twice := [key for key in names if names.count(key) > 1]:
        raise ConfigError(f"gives {twice[0]!r} twice")
    return dict(pairs)


def _decode(text: str, name: str) -> tuple[Any, int]:
    """The JSON value at the beginning, and where it ends."""
    try:
        return json.JSONDecoder(object_pairs_hook=_once).raw_decode(text)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error


def read_settings(path: str | Path, base: Setting | None = None) -> list[Setting]:
    """Settings of a JSON file: ``{"name": {field: value, "sparse": {...}}, ...}``.

    Raises:
        DllmServeError: the file or a setting is wrong.
        OSError: the file cannot be read.
    """
    text = read_text(path).strip()
    value, end = _decode(text, str(path))
    if end < len(text):
        raise ConfigError(f"{path} goes on behind its object with {text[end:].split()[0]!r}")
    if not isinstance(value, dict) or not value:
        raise ConfigError(
            f'{path} must hold an object of settings, such as {{"fast": {{"unmask": "threshold"}}}}'
        )
    try:
        return [make_setting(name, given, base) for name, given in value.items()]
    except DllmServeError as error:
        raise type(error)(f"{path}: {error}") from error


def suite(name: str, base: Setting | None = None) -> list[Setting]:
    """The settings of a built-in list.

    Example:
        >>> [setting.name for setting in suite("frontier")][:2]
        ['one token a step', '2 tokens a step']
    """
    check_choice(ConfigError, "suite", name, SUITES)
    return [make_setting(key, values, base) for key, values in SUITES[name].items()]


def check_names(settings: Iterable[Setting]) -> None:
    """Raise ConfigError if two settings have the same name."""
    seen: set[str] = set()
    for setting in settings:
        if setting.name in seen:
            raise ConfigError(f"two settings are named {setting.name!r}: give each its own name")
        seen.add(setting.name)


def describe(setting: Setting) -> str:
    """A short name by what the setting does.

    Example:
        >>> describe(Setting("", {"unmask": "threshold", "cache": "dual"}))
        'threshold 0.9, dual'
    """
    params, given = setting.params(), dict(setting.sampling)
    rule = given.pop("unmask", params.unmask)
    if (quality := given.pop("quality", None)) is not None:
        parts = [f"quality {quality}"] + ([] if rule == params.unmask else [rule])
    elif rule != "steps" or PACES & given.keys():
        told = PACES if rule == "steps" else {rule}
        given = {k: v for k, v in given.items() if k not in told}
        parts = [rule_text(params)]
    else:
        count = setting.tokens_per_step or 1
        parts = ["one token a step" if count == 1 else f"{count} tokens a step"]
    if (cache := given.pop("cache", "none")) != "none":
        parts.append(cache)
    parts += [f"{name} {_brief(value)}" for name, value in given.items()]
    if params.sparse is not None:
        parts.append(f"sparse {params.sparse.retention_ratio:g}")
    return ", ".join(parts)


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


#: plain types of fields, by their name, and whether they may be None
_TYPES = {
    **types(SparseConfig),
    **types(SamplingParams),
    TOKENS_PER_STEP: (int, False),
    SPARSE: (bool, False),
}

Settings = dict[str, dict[str, Any]]

_STEPS: dict[str, Any] = {"unmask": "steps", TOKENS_PER_STEP: 1}
_ATTENTION: dict[str, Any] = {"score": "attention", "pool_kernel": 1}
_ONE = {"one token a step": _STEPS}


def _rule(name: str, field: str, *values: float, **more: Any) -> Settings:
    """A rule with several values of one field."""
    return {f"{name} {value:g}": {"unmask": name, field: value, **more} for value in values}


#: every rule, from careful to bold
_FRONTIER: Settings = {
    **_ONE,
    **{f"{n} tokens a step": {**_STEPS, TOKENS_PER_STEP: n} for n in (2, 4, 8, 16, 32)},
    "left to right": {"unmask": "sequential"},
    **_rule("dynamic", "threshold", 0.9),
    **_rule("threshold", "threshold", 0.99, 0.9, 0.8, 0.6, 0.2),
    **_rule("threshold_strict", "threshold", 0.9),
    **_rule("threshold_dinfer", "threshold", 0.9),
    **_rule("factor", "factor", 1.0),
    **_rule("factor_strict", "factor", 0.25, 1.0),
    **_rule("entropy_bound", "entropy_bound", 0.02, 0.15, 0.5, 1.5),
    **_rule("hierarchy", "threshold", 0.9, low_threshold=0.4),
    **_rule("credit", "threshold", 0.9),
    **_rule("klass", "threshold", 0.9, 0.6, kl_history=1),
    **_rule("wino", "threshold", 0.6, 0.3),
    **_rule("joint", "threshold", 0.5),
}

#: every refresh policy and sparse attention, one token a step
_CACHES: Settings = {
    **_ONE,
    **{f"suffix {n}": {**_STEPS, "suffix_window": n} for n in (0, 32)},
    "suffix 32, early end": {**_STEPS, "suffix_window": 32, "early_end": True},
    **{name: {**_STEPS, "cache": name} for name in ("prefix", "dual", "rolling", "delayed")},
    "dual, delay 1": {**_STEPS, "cache": "dual", "refresh_delay": 1},
    "dual, every 8": {**_STEPS, "cache": "dual", "refresh_every": 8},
    "dual, window 16": {**_STEPS, "cache": "dual", "refresh_window": 16},
    "rolling, suffix 32": {**_STEPS, "cache": "rolling", "suffix_window": 32},
    "drift 0.25": {**_STEPS, "cache": "drift", "refresh_share": 0.25},
    "sparse 0.5": {**_STEPS, SPARSE: {"retention_ratio": 0.5}},
    "sparse 0.5 shared": {**_STEPS, SPARSE: {"retention_ratio": 0.5, "head_select": False}},
    "attention 0.5": {**_STEPS, SPARSE: {"retention_ratio": 0.5, **_ATTENTION}},
    "attention 0.5, min 64": {
        **_STEPS,
        SPARSE: {"retention_ratio": 0.5, "min_keep": 64, **_ATTENTION},
    },
}

#: name -> settings by name
SUITES: dict[str, Settings] = {
    "frontier": _FRONTIER,
    "caches": _CACHES,
    "quality": {name: {"quality": name} for name in PRESETS},
}
#: suites of settings that models of another geometry refuse
OF_FULL_ATTENTION = frozenset({"caches"})
