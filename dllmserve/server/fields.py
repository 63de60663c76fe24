"""Request fields that several endpoints share, and the parameters they stand for.

Everything is strict: a boolean is no number, a text is no number, an unknown field is an
error. None stands for "not given" everywhere.

An error costs a thousand times what a byte of a body does, so the number of errors in a body is
limited: lists are of type :data:`Listed`, dicts of :data:`Entries`, objects of :class:`Body`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    WrapValidator,
    create_model,
    model_validator,
)

from dllmserve._values import (
    LOGIT_BIAS_BOUND,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    SparseConfig,
)
from dllmserve.errors import InvalidParameterError
from dllmserve.knobs import knobs, types
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.error_texts import NO_CHARACTER
from dllmserve.server.failures import ApiError

MAX_STOP_LENGTH = 256
#: longest name of a rule, a cache and the like
MAX_NAME = 64
# /openapi.json writes bounds as floats, so they are numbers that a float holds exactly
LARGEST = 2**53 - 1
#: largest seed: more than 64 bits, of which 63 are used
MAX_SEED = 2 * 10**19
#: entries of a dict that are validated at a time; unknown fields of a body that are named
_PIECE = 8
#: largest token id; larger ones are outside every vocabulary
_MAX_TOKEN_ID = 2**31 - 1


def _unicode(text: str) -> str:
    """Refuse lone surrogates: JSON can carry them, but they are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(NO_CHARACTER) from error
    return text


def _in_pieces(value: Any, validated: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Validate a dict up to the first few entries with a wrong one among them."""
    if not isinstance(value, dict) or len(value) <= _PIECE:
        return validated(value)
    entries = iter(value.items())
    made: dict[str, Any] = {}
    while piece := dict(islice(entries, _PIECE)):
        made |= validated(piece)
    return made


_T = TypeVar("_T")
#: a list in which only the first wrong element is an error
Listed = Annotated[list[_T], Field(fail_fast=True)]
#: a dict in which only the first wrong entries are errors
Entries = Annotated[dict[str, _T], WrapValidator(_in_pieces)]
Text = Annotated[str, AfterValidator(_unicode)]
# bounds come before validators, or the schema does not show them
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_unicode)]
StopTexts = Annotated[Listed[StopText], Field(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
TokenIds = Annotated[
    Listed[TokenId],
    # for error messages, see error_texts.py
    Field(min_length=1, json_schema_extra={"x-takes": "a list of token ids that is not empty"}),
]
Prompt = Annotated[str, Field(min_length=1), AfterValidator(_unicode)] | TokenIds
Number = Annotated[float, Field(allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-LOGIT_BIAS_BOUND, le=LOGIT_BIAS_BOUND, allow_inf_nan=False)]
_BIAS_ID = r"^(0|[1-9][0-9]{0,9})$"
Biases = Annotated[
    dict[Annotated[str, Field(pattern=_BIAS_ID)], Bias],
    WrapValidator(_in_pieces),
    Field(max_length=MAX_LOGIT_BIAS),
    WithJsonSchema(
        {
            "type": "object",
            "patternProperties": {
                _BIAS_ID: {
                    "type": "number",
                    "minimum": -LOGIT_BIAS_BOUND,
                    "maximum": LOGIT_BIAS_BOUND,
                }
            },
            "additionalProperties": False,
            "propertyNames": {"description": "token ids, as texts"},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]


Choice = Annotated[str, Field(min_length=1), AfterValidator(_unicode)]
#: fields that are more than a number or a name; elements of lists are checked as they are read
_TYPES: dict[str, Any] = {
    "stop_token_ids": Annotated[Listed[TokenId], Field(max_length=MAX_STOP_IDS)],
    "choice": Annotated[Listed[Choice], Field(min_length=1, max_length=MAX_CHOICES)],
    "json_schema": dict[str, Any] | Text,
    "regex": Text,
}


def _fields(kind: type[Any], parent: str = "") -> dict[str, tuple[Any, Any]]:
    """Types and fields of a body for the knobs of a dataclass; None is "not given" for all of them.

    Args:
        kind: the dataclass.
        parent: the field that holds them, where they may also stand beside it.
    """
    found = {}
    for name, it in knobs(kind).items():
        plain = _TYPES.get(name, types(kind)[name][0])
        text = f"As {parent}.{name}; implies {parent}." if parent else it.help
        bounds = {"gt" if it.low_open else "ge": it.low, "le": it.high}
        if it.most_asked is not None:
            bounds["le"] = it.most_asked
        if plain is int and bounds["le"] is None:
            bounds["le"] = LARGEST
        extra: dict[str, Any] = {}
        if plain is float:
            extra = {"allow_inf_nan": False}
        elif it.choices is not None:
            # no Literal: rules and caches may be added to the catalogue. Errors show the value
            extra = {"max_length": MAX_NAME, "json_schema_extra": {"enum": [*it.values(), None]}}
        extra |= {bound: value for bound, value in bounds.items() if value is not None}
        found[name] = (plain | None, Field(default=None, description=text, **extra))
    return found


def neutral(*values: Any) -> Any:
    """A field that only takes these values (and null); they change nothing."""

    def check(value: Any) -> Any:
        for allowed in values:
            # False is no 0 here
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return value
        if value is None:
            return None
        texts = (repr(v) if isinstance(v, str) else json.dumps(v) for v in values)
        shown = " or ".join(texts) or "null"
        raise ValueError(f"is not supported by this server; leave it out, or give {shown}")

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": [*values, None]})]


class Body(BaseModel):
    """A request body: strict, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        """Keep a few of many unknown fields, so that there are few errors."""
        known = {found.alias or name for name, found in cls.model_fields.items()}
        if not isinstance(value, dict) or len(value) <= len(known) + _PIECE:
            return value
        kept = {name: value[name] for name in known if name in value}
        unknown = (item for item in value.items() if item[0] not in known)
        return kept | dict(islice(unknown, _PIECE))


def example(**values: Any) -> ConfigDict:
    """Model config with an example body that works as it is, for the page of the API."""
    return ConfigDict(json_schema_extra={"examples": [values]})


#: fields of SamplingParams that each kind of endpoint declares for itself
_OWN = ("temperature", "max_tokens", "gen_length", "top_p", "seed", "stop", "logit_bias", "sparse")
_SAMPLING, _SPARSE = _fields(SamplingParams), _fields(SparseConfig)
if TYPE_CHECKING:
    _Decoding = Body
    _Sparse = Body
else:
    _shared = {name: made for name, made in _SAMPLING.items() if name not in _OWN}
    _flat = {
        name: made for name, made in _fields(SparseConfig, "sparse").items() if name != "enabled"
    }
    _Decoding = create_model("_Decoding", __base__=Body, **_shared, **_flat)
    _Sparse = create_model("_Sparse", __base__=Body, **_SPARSE)


class SparseFields(_Sparse):
    """Fields of SparseConfig."""


class DecodingFields(_Decoding):
    """How an answer is decoded: fields of SamplingParams and SparseConfig."""

    sparse: bool | SparseFields | None = Field(
        default=None, description="Sparse attention: true, or its settings."
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="Seconds that the request may take; the server's own limit stays.",
    )

    def sparse_config(self) -> SparseConfig | None:
        """The SparseConfig that the fields stand for; None for dense attention."""
        flat = {
            name: value
            for name in SparseFields.model_fields
            if name != "enabled" and (value := getattr(self, name)) is not None
        }
        nested: dict[str, Any] = {}
        if isinstance(self.sparse, SparseFields):
            nested = given(self.sparse)
            if flat:
                name = next(iter(flat))
                raise ApiError(
                    400,
                    f"{name} belongs into sparse, where the other settings are",
                    code="invalid_parameter",
                    param=name,
                )
        elif self.sparse is False and flat:
            name = next(iter(flat))
            raise ApiError(
                400,
                f"{name} means nothing with sparse=false: leave one of them out",
                code="invalid_parameter",
                param=name,
            )
        elif not self.sparse and not flat:
            return None
        config = SparseConfig(**{**flat, **nested})
        return config if config.enabled else None

    def decoding(self) -> dict[str, Any]:
        """The fields of SamplingParams that were given, with the SparseConfig among them."""
        names = _SAMPLING.keys() - _OWN
        found = {n: v for n in names if (v := getattr(self, n)) is not None}
        sparse = self.sparse_config()
        return found if sparse is None else {**found, "sparse": sparse}


class NativeFields(DecodingFields):
    """All fields of SamplingParams, with its own defaults."""

    temperature: float | None = _SAMPLING["temperature"][1]
    max_tokens: int | None = _SAMPLING["max_tokens"][1]
    gen_length: int | None = _SAMPLING["gen_length"][1]
    top_p: float | None = _SAMPLING["top_p"][1]
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Makes draws repeatable; taken modulo 2**63."
    )
    stop: StopText | StopTexts | None = None
    logit_bias: Biases | None = None

    def sampling_params(self) -> SamplingParams:
        """The parameters. Raises InvalidParameterError for a combination that is refused."""
        values = self.decoding()
        for name in ("temperature", "max_tokens", "gen_length", "top_p", "stop"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.seed is not None:
            values["seed"] = self.seed % 2**63
        if self.logit_bias:
            values["logit_bias"] = bias_ids(self.logit_bias)
        return SamplingParams(**values)


def given(body: BaseModel) -> dict[str, Any]:
    """The fields of a body that are not None."""
    return {n: v for n in type(body).model_fields if (v := getattr(body, n)) is not None}


def bias_ids(biases: dict[str, float]) -> dict[int, float]:
    """JSON's text keys as token ids."""
    found = {int(name): value for name, value in biases.items()}
    if len(found) > MAX_LOGIT_BIAS:
        raise InvalidParameterError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens")
    return found
