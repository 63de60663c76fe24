"""Request fields that several endpoints share, and the parameters they stand for.

Everything is strict: a boolean is no number, a text is no number, an unknown field is an
error. None stands for "not given" everywhere.

An error costs a thousand times what a byte of a body does, so a body must have few, whatever is
in it: lists are of type :data:`Listed`, dicts :data:`Entries`, objects :class:`Body`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from dllmserve.catalog import RULES
from dllmserve.errors import InvalidParameterError
from dllmserve.presets import PRESETS
from dllmserve.sampling_params import (
    CONFIDENCE,
    LOGIT_BIAS_BOUND,
    MAX_GEN_LENGTH,
    MAX_KL_HISTORY,
    MAX_LOGIT_BIAS,
    MAX_STEPS,
    MAX_STOP_STRINGS,
    REMASKING,
    SCHEDULES,
    SamplingParams,
    cache_names,
)
from dllmserve.server.failures import ApiError
from dllmserve.server.wrong import NO_CHARACTER
from dllmserve.sparse.state import SCORES, SparseConfig

MAX_STOP_LENGTH = 256
#: of a rule, a cache and the like
MAX_NAME = 64
# /openapi.json writes bounds as floats, so they are numbers that a float holds exactly
LARGEST = 2**53 - 1
#: of a seed: more than 64 bits, of which 63 are used
MAX_SEED = 2 * 10**19
#: entries of a dict that are validated at a time; unknown fields of a body that are named
_PIECE = 8
#: of a token id; larger ones are outside every vocabulary
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
#: a list of which the first wrong element alone is an error
Listed = Annotated[list[_T], Field(fail_fast=True)]
#: a dict of which the first wrong entries alone are errors
Entries = Annotated[dict[str, _T], WrapValidator(_in_pieces)]
Text = Annotated[str, AfterValidator(_unicode)]
# bounds come before validators, or the schema does not show them
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_unicode)]
StopTexts = Annotated[Listed[StopText], Field(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
TokenIds = Annotated[
    Listed[TokenId],
    # for error messages, see wrong.py
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


def _count(low: int, high: int, text: str) -> Any:
    return Field(default=None, ge=low, le=high, description=text)


def _number(low: float | None, high: float | None, text: str) -> Any:
    return Field(default=None, ge=low, le=high, allow_inf_nan=False, description=text)


def _choice(values: tuple[str, ...], text: str) -> Any:
    # no Literal: rules and caches may be added to the catalogue. Errors show the value
    return Field(
        default=None,
        max_length=MAX_NAME,
        description=text,
        json_schema_extra={"enum": [*values, None]},
    )


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
    """A request body: strict, and without room for unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        """Of many unknown fields keep a few, which are then the errors."""
        known = cls.model_fields
        if not isinstance(value, dict) or len(value) <= len(known) + _PIECE:
            return value
        kept = {name: value[name] for name in known if name in value}
        unknown = (item for item in value.items() if item[0] not in known)
        return kept | dict(islice(unknown, _PIECE))


def example(**values: Any) -> ConfigDict:
    """Model config with a body that works as it is, for the page of the API."""
    return ConfigDict(json_schema_extra={"examples": [values]})


class SparseFields(Body):
    """Fields of SparseConfig."""

    enabled: bool | None = Field(default=None, description="False is as if it were not given.")
    retention_ratio: float | None = _number(0, 1, "Share of the context that is kept.")
    delay_step: int | None = _count(0, LARGEST, "Full forwards before the one that selects.")
    default_block_len: int | None = _count(1, MAX_GEN_LENGTH, "Scoring window in tokens.")
    head_select: bool | None = Field(default=None, description="Select for each K,V head.")
    pool_kernel: int | None = _count(1, 1024, "Width of the max-pooling over scores.")
    score: str | None = _choice(SCORES, "What tokens are scored by.")
    min_keep: int | None = _count(0, LARGEST, "Tokens that are kept at least.")


class DecodingFields(Body):
    """How an answer is decoded: fields of SamplingParams and SparseConfig."""

    steps: int | None = _count(1, MAX_STEPS, "Denoising steps for the whole answer.")
    block_length: int | None = _count(1, MAX_GEN_LENGTH, "Tokens per diffusion block.")
    # far above what is useful; without a bound the logits overflow
    cfg_scale: float | None = _number(0, 1000, "Classifier-free guidance; 0 is off.")
    remasking: str | None = _choice(REMASKING, "Which proposals are kept.")
    unmask: str | None = _choice(tuple(RULES), "Rule that chooses what is written.")
    threshold: float | None = _number(
        None, None, "For unmask=threshold, threshold_strict, hierarchy, credit, klass, wino."
    )
    factor: float | None = _number(0, None, "For unmask=factor and factor_strict.")
    entropy_bound: float | None = _number(0, None, "For unmask=entropy_bound, in nats.")
    low_threshold: float | None = _number(0, 1, "For unmask=hierarchy.")
    kl_threshold: float | None = _number(0, None, "For unmask=klass, in nats.")
    kl_history: int | None = _count(1, MAX_KL_HISTORY, "For unmask=klass, in forwards.")
    threshold_back: float | None = _number(0, 1, "For unmask=wino.")
    confidence: str | None = _choice(CONFIDENCE, "What proposals are ranked by.")
    schedule: str | None = _choice(SCHEDULES, "How unmask=steps spreads the tokens.")
    eps: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    cache: str | None = _choice(cache_names(), "K,V cache: none is exact.")
    refresh_delay: int | None = _count(0, MAX_STEPS, "Whole-canvas forwards after the first.")
    refresh_every: int | None = _count(1, MAX_STEPS, "Refresh again after so many forwards.")
    refresh_window: int | None = _count(0, MAX_GEN_LENGTH, "Tokens computed around the block.")
    refresh_share: float | None = _number(0, 1, "For cache=drift: share that is recomputed.")
    suffix_window: int | None = _count(0, MAX_GEN_LENGTH, "Masks behind the block that are seen.")
    early_end: bool | None = Field(default=None, description="Decode nothing behind an end id.")
    quality: str | None = _choice(
        tuple(PRESETS), "Preset of the decoding fields; those that are given keep their values."
    )
    top_k: int | None = _count(0, LARGEST, "Draw from the k likeliest tokens; 0 is off.")
    ignore_eos: bool | None = Field(default=None, description="Go on after an end id.")
    logits_eos_inf: bool | None = Field(
        default=None, description="Never propose an id that ends the text."
    )
    confidence_eos_eot_inf: bool | None = Field(
        default=None, description="Write proposals that end the text or the turn last."
    )
    sparse: bool | SparseFields | None = Field(
        default=None, description="Sparse attention: true, or its settings."
    )
    retention_ratio: float | None = _number(0, 1, "As sparse.retention_ratio; implies sparse.")
    delay_step: int | None = _count(0, LARGEST, "As sparse.delay_step; implies sparse.")
    default_block_len: int | None = _count(1, MAX_GEN_LENGTH, "As sparse.default_block_len.")
    head_select: bool | None = Field(default=None, description="As sparse.head_select.")
    pool_kernel: int | None = _count(1, 1024, "As sparse.pool_kernel.")
    score: str | None = _choice(SCORES, "As sparse.score.")
    min_keep: int | None = _count(0, LARGEST, "As sparse.min_keep.")
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
        """The fields of SamplingParams that were given."""
        names = set(DecodingFields.model_fields) - set(SparseFields.model_fields)
        names -= {"sparse", "timeout"}
        return {n: v for n in names if (v := getattr(self, n)) is not None}


class NativeFields(DecodingFields):
    """All fields of SamplingParams, with its own defaults."""

    temperature: float | None = _number(0, None, "0 takes the likeliest token.")
    max_tokens: int | None = _count(1, MAX_GEN_LENGTH, "Another name of gen_length.")
    gen_length: int | None = _count(1, MAX_GEN_LENGTH, "Length of the answer in tokens.")
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = _count(0, MAX_SEED, "Makes the draws repeatable; taken modulo 2**63.")
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
