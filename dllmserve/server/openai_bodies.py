"""Bodies of the OpenAI endpoints: OpenAI's fields, and the diffusion options beside them.

A field that a diffusion model cannot honour may be there with its neutral value, and with
no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, Field

from dllmserve._stepwise import stepwise
from dllmserve._values import MAX_GEN_LENGTH, MAX_LOGPROBS
from dllmserve.core.limits import Limits
from dllmserve.core.validator import room_of, window_of
from dllmserve.messages import template_messages
from dllmserve.process.messages import EngineInfo
from dllmserve.sampling_params import SamplingParams
from dllmserve.server.config import ServerConfig
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import (
    LARGEST,
    MAX_SEED,
    Biases,
    Body,
    DecodingFields,
    Entries,
    Listed,
    Prompt,
    StopText,
    StopTexts,
    Text,
    bias_ids,
    example,
    neutral,
)
from dllmserve.server.openai_messages import AssistantMessage, Messages
from dllmserve.server.strict_json import check_texts
from dllmserve.server.structured import StructuredFields
from dllmserve.server.tools import ToolFields

#: of answers, where neither the request nor the operator says otherwise
DEFAULT_MAX_TOKENS = 128
#: variables of chat templates that are not for clients to set
TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt")
#: OpenAI's limit
MAX_CHOICES = 128
#: what an answer has to match says nothing of how it is decoded, nor does what it tells of itself
MATCHED = ("regex", "json_schema", "choice", "logprobs")


def _not_read() -> Any:
    return Field(default=None, description="Not read.")


def _dropped(value: Any) -> None:
    """What is not read is not kept either."""


_T = TypeVar("_T")
#: validated and then dropped
Unread = Annotated[_T | None, AfterValidator(_dropped)]


class StreamOptions(Body):
    """What a stream also tells."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: neutral(False) = None  # type: ignore[valid-type]


class OpenAIFields(StructuredFields, DecodingFields):
    """Fields of both endpoints."""

    #: an answer that ends by itself may take all of the context if no length was given
    open_ended: ClassVar[bool] = False

    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_GEN_LENGTH)
    gen_length: int | None = Field(
        default=None, ge=1, le=MAX_GEN_LENGTH, description="The same as max_tokens."
    )
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stop: StopText | StopTexts | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # of no meaning here, whatever their value
    user: Unread[Text] = _not_read()
    store: Unread[bool] = _not_read()
    metadata: Unread[Entries[Text]] = _not_read()
    service_tier: Unread[Text] = _not_read()
    safety_identifier: Unread[Text] = _not_read()
    prompt_cache_key: Unread[Text] = _not_read()
    prompt_cache_retention: Unread[Text] = _not_read()
    frequency_penalty: neutral(0) = None  # type: ignore[valid-type]
    presence_penalty: neutral(0) = None  # type: ignore[valid-type]
    # not OpenAI's, but sent by clients made for other servers
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=LARGEST,
        description="Draw from the k likeliest tokens; 0 and -1 are off.",
    )
    repetition_penalty: neutral(1) = None  # type: ignore[valid-type]
    min_p: neutral(0) = None  # type: ignore[valid-type]
    min_tokens: neutral(0) = None  # type: ignore[valid-type]

    def likeliest(self) -> int | None:
        """How many log-probabilities are told beside each token's own; None: none at all."""
        return None

    def length(self) -> int | None:
        """The answer's length, if it was given under any of its names."""
        names = ("gen_length", "max_tokens", "max_completion_tokens")
        found = {n: v for n in names if (v := getattr(self, n, None)) is not None}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{n}={v}" for n, v in found.items())
            raise ApiError(
                400,
                f"{text} contradict each other: give one",
                code="invalid_parameter",
                param=next(iter(found)),
            )
        return next(iter(found.values()), None)

    def choices(self, config: ServerConfig) -> int:
        """How many answers to one prompt are asked for."""
        count = 1 if self.n is None else self.n
        if count > config.max_n:
            raise ApiError(
                400, f"n={count} is over max_n={config.max_n}", code="invalid_parameter", param="n"
            )
        return count

    def sampling_params(
        self,
        prompt_len: int,
        engine: EngineInfo,
        config: ServerConfig,
        constraint: dict[str, Any],
    ) -> Any:
        """A function from the number of a choice to its SamplingParams.

        Args:
            prompt_len: prompt tokens.
            engine: what is known of the model and the engine's sizes.
            config: where the defaults come from.
            constraint: what the answer has to match, as fields of SamplingParams.
        """
        values = {k: v for k, v in self.decoding().items() if k not in MATCHED} | constraint
        if (likeliest := self.likeliest()) is not None:
            values["logprobs"] = likeliest
        if self._plain(values) and config.default_quality != "exact":
            values["quality"] = config.default_quality
        length = self.length()
        if length is None:
            length = self._default_length(values, prompt_len, engine, config)
        # what errors call it; both names stand for the same
        values["max_tokens" if self.gen_length is None else "gen_length"] = length
        for name in ("temperature", "top_p", "stop"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.top_k == -1:
            values["top_k"] = 0
        if self.logit_bias:
            values["logit_bias"] = bias_ids(self.logit_bias)
        params, first = stepwise(values), self.seed

        def choice(number: int) -> SamplingParams:
            return params if first is None else replace(params, seed=(first + number) % 2**63)

        return choice

    def _default_length(
        self, values: dict[str, Any], prompt_len: int, engine: EngineInfo, config: ServerConfig
    ) -> int:
        """The answer's length where none was given.

        An answer that ends by itself, and sees only some masks behind its block, takes the same
        forwards whatever its length: it gets what fits.
        """
        limits, params = engine.limits, SamplingParams(**values)
        window = window_of(engine.spec, params)
        ends = params.early_end and params.suffix_window is not None
        room = limits.max_model_len
        if window:  # no masks are seen behind a block, and one that has begun is filled
            ends = not params.ignore_eos
            room = min(room, limits.num_pages * limits.page_size)
            room = room_of(engine.spec, params, prompt_len, room)
        ends = self.open_ended and ends and config.default_max_tokens is None
        if ends and not window:
            room = _room(limits, params, prompt_len)
        most = MAX_GEN_LENGTH if ends else config.default_max_tokens or DEFAULT_MAX_TOKENS
        return max(1, min(most, room - prompt_len))

    @staticmethod
    def _plain(values: dict[str, Any]) -> bool:
        """True if the request says nothing of how it is decoded."""
        said = {"gen_length", "max_tokens", "top_k", "ignore_eos", "stop_token_ids", *MATCHED}
        return not set(values) - said


def _room(limits: Limits, params: SamplingParams, prompt_len: int) -> int:
    """Positions of a request with full attention that ends by itself.

    K,V pages are reserved for all of it, so it gets no more than its share, unless that is short.
    """
    rows = 2 if params.cfg_scale else 1
    room = min(limits.max_model_len, limits.max_num_batched_tokens // rows)
    if params.cache == "none":
        return room
    share = limits.num_pages // limits.max_num_seqs * limits.page_size
    pages = limits.num_pages // rows * limits.page_size
    return min(room, max(share, prompt_len + DEFAULT_MAX_TOKENS), pages)


class CompletionRequest(OpenAIFields):
    """Body of /v1/completions."""

    model_config = example(prompt="The president", max_tokens=32, temperature=0)

    prompt: Prompt | Annotated[Listed[Prompt], Field(min_length=1)] = Field(
        description="A text, token ids, or a list of either.",
        json_schema_extra={
            "x-takes": "a text, token ids, or a list of texts or of token ids, and nothing empty"
        },
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Must equal n.")
    suffix: Text | None = Field(
        default=None, description="What stands behind the answer, which is made to fit it."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of each token, and of so many of the likeliest.",
    )

    def likeliest(self) -> int | None:
        """See :meth:`OpenAIFields.likeliest`. Raises ApiError if the prompt's are asked for."""
        if self.logprobs is not None and self.echo:
            raise ApiError(
                400,
                "echo with logprobs asks for log-probabilities of the prompt, and only those of "
                "answers are known: leave one of them out. Likelihoods of given texts are what "
                "LLM.log_likelihood of the Python package is for",
                code="invalid_parameter",
                param="echo",
            )
        return self.logprobs

    def prompts(self) -> Any:
        """The prompts, always as a list: list[str] or list[list[int]]."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of must equal n", code="invalid_parameter", param="best_of")
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ChatRequest(ToolFields, OpenAIFields):
    """Body of /v1/chat/completions."""

    model_config = example(
        messages=[{"role": "user", "content": "Sort the numbers: 9 41 7"}],
        max_tokens=32,
        temperature=0,
    )
    open_ended: ClassVar[bool] = True

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_GEN_LENGTH)
    logprobs: bool | None = Field(
        default=None, description="Log-probabilities of each token of the answer."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="And of so many of the likeliest."
    )
    modalities: neutral(["text"]) = None  # type: ignore[valid-type]
    audio: neutral() = None  # type: ignore[valid-type]
    prediction: neutral() = None  # type: ignore[valid-type]
    moderation: neutral() = None  # type: ignore[valid-type]
    web_search_options: neutral() = None  # type: ignore[valid-type]
    prompt_cache_options: neutral() = None  # type: ignore[valid-type]
    continue_final_message: bool | None = Field(
        default=None, description="Go on with the last message, which is the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Not continue_final_message, if it is given at all."
    )
    chat_template_kwargs: Entries[Any] | None = Field(
        default=None, description="More that the chat template may read, such as enable_thinking."
    )
    reasoning_effort: Unread[Text] = _not_read()
    verbosity: Unread[Text] = _not_read()

    def continues(self) -> bool:
        """Whether the answer goes on with the last message. Raises ApiError for a contradiction."""
        continues = bool(self.continue_final_message)
        if self.add_generation_prompt is continues:  # None is neither
            wanted = "false" if continues else "true"
            raise ApiError(
                400,
                "an answer is a new message (add_generation_prompt) or goes on with the last one "
                f"(continue_final_message): leave add_generation_prompt out, or give {wanted}",
                code="invalid_parameter",
                param="add_generation_prompt",
            )
        return continues

    def likeliest(self) -> int | None:
        """See :meth:`OpenAIFields.likeliest`. Raises ApiError for top_logprobs alone."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                400,
                f"top_logprobs={self.top_logprobs} needs logprobs=true",
                code="invalid_parameter",
                param="top_logprobs",
            )
        return (self.top_logprobs or 0) if self.logprobs else None


def template_variables(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a chat template may read besides. Raises ApiError for what the server gives it."""
    for name in given or ():
        if name in TEMPLATE_NAMES:
            raise ApiError(
                400,
                f"chat_template_kwargs has '{name}', which the server gives the template itself",
                code="invalid_parameter",
                param="chat_template_kwargs",
            )
    return given


def conversation_of(messages: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them.

    Raises:
        ApiError: arguments of calls hold too much to be parsed.
    """
    called = (m.arguments() for m in messages if isinstance(m, AssistantMessage))
    check_texts(chain.from_iterable(called), "messages")
    return template_messages([m.model_dump(exclude_none=True) for m in messages])
