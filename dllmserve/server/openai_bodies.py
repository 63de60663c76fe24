"""Bodies of the OpenAI endpoints: OpenAI's fields, and the diffusion options beside them.

A field that a diffusion model cannot honour may be there with its neutral value, and with
no other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from dllmserve.core.schedule import block_lengths
from dllmserve.sampling_params import (
    MAX_GEN_LENGTH,
    MAX_STEPS,
    SamplingParams,
)
from dllmserve.server.config import ServerConfig
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import (
    LARGEST,
    MAX_SEED,
    Biases,
    Body,
    DecodingFields,
    Prompt,
    StopText,
    Text,
    bias_ids,
    example,
)

#: OpenAI's limits
MAX_STOPS = 4
MAX_MESSAGES = 1024
MAX_CHOICES = 128


def neutral(*values: Any) -> Any:
    """A field that only takes these values (and null); they change nothing."""

    def check(value: Any) -> Any:
        for allowed in values:
            # False is no 0 here
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return value
        if value is None:
            return None
        shown = " or ".join(repr(v) for v in values) or "null"
        raise ValueError(f"is not supported by this server; leave it out, or give {shown}")

    return Annotated[Any, PlainValidator(check), WithJsonSchema({"enum": [*values, None]})]


class StreamOptions(Body):
    """What a stream also tells."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: neutral(False) = None  # type: ignore[valid-type]


Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class OpenAIFields(DecodingFields):
    """Fields of both endpoints."""

    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_GEN_LENGTH)
    gen_length: int | None = Field(
        default=None, ge=1, le=MAX_GEN_LENGTH, description="The same as max_tokens."
    )
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    stop: StopText | Stops | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(default=None, description="Not read.")
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

    def sampling_params(self, prompt_len: int, max_len: int, config: ServerConfig) -> Any:
        """A function from the number of a choice to its SamplingParams.

        Args:
            prompt_len: prompt tokens.
            max_len: of the engine.
            config: where the defaults come from.
        """
        values = self.decoding()
        length = self.length()
        if length is None:
            length = max(1, min(config.default_max_tokens, max_len - prompt_len))
        # what errors call it; both names stand for the same
        values["max_tokens" if self.gen_length is None else "gen_length"] = length
        sparse = self.sparse_config()
        if self._plain(values) and sparse is None and config.default_quality != "exact":
            values["quality"] = config.default_quality
        # a quality brings its own block length
        if not {"block_length", "quality"} & set(values) and sparse is None:
            values["block_length"] = config.default_block_length
        for name in ("temperature", "top_p", "stop"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.top_k == -1:
            values["top_k"] = 0
        if self.logit_bias:
            values["logit_bias"] = bias_ids(self.logit_bias)
        if "steps" not in values and "quality" not in values:
            block = values.get("block_length") or (sparse.default_block_len if sparse else length)
            # steps are spread evenly over the blocks; those that a block does not need cost
            # nothing, so this is one token a step
            steps = len(block_lengths(length, block)) * min(block, length)
            values["steps"] = min(steps, MAX_STEPS)

        def choice(number: int) -> SamplingParams:
            seed = None if self.seed is None else (self.seed + number) % 2**63
            return SamplingParams(**values, seed=seed)

        return choice

    @staticmethod
    def _plain(values: dict[str, Any]) -> bool:
        """True if the request says nothing of how it is decoded."""
        return not set(values) - {"gen_length", "max_tokens", "top_k", "ignore_eos"}


class CompletionRequest(OpenAIFields):
    """Body of /v1/completions."""

    model_config = example(prompt="The president", max_tokens=32, temperature=0)

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)] = Field(
        description="A text, token ids, or a list of either."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Must equal n.")
    suffix: neutral("") = None  # type: ignore[valid-type]
    logprobs: neutral() = None  # type: ignore[valid-type]

    def prompts(self) -> Any:
        """The prompts, always as a list: list[str] or list[list[int]]."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of must equal n", code="invalid_parameter", param="best_of")
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A message; the content is a text, or parts that are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: neutral() = None  # type: ignore[valid-type]
    # some clients mark whole messages as they mark parts
    type: neutral("text") = None  # type: ignore[valid-type]
    # an answer's message comes back with them in the next turn
    refusal: neutral() = None  # type: ignore[valid-type]
    annotations: neutral([]) = None  # type: ignore[valid-type]
    audio: neutral() = None  # type: ignore[valid-type]
    function_call: neutral() = None  # type: ignore[valid-type]
    tool_calls: neutral([]) = None  # type: ignore[valid-type]

    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        # templates know OpenAI's newer name for the system role by its older one
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Body):
    """Only free text."""

    type: neutral("text")  # type: ignore[valid-type]


class ChatRequest(OpenAIFields):
    """Body of /v1/chat/completions."""

    model_config = example(
        messages=[{"role": "user", "content": "Sort the numbers: 9 41 7"}],
        max_tokens=32,
        temperature=0,
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_GEN_LENGTH)
    logprobs: neutral(False) = None  # type: ignore[valid-type]
    top_logprobs: neutral(0) = None  # type: ignore[valid-type]
    response_format: ResponseFormat | None = None
    tools: neutral([]) = None  # type: ignore[valid-type]
    tool_choice: neutral("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: neutral(True, False) = None  # type: ignore[valid-type]
    functions: neutral([]) = None  # type: ignore[valid-type]
    function_call: neutral("none", "auto") = None  # type: ignore[valid-type]
    modalities: neutral(["text"]) = None  # type: ignore[valid-type]
    audio: neutral() = None  # type: ignore[valid-type]
    prediction: neutral() = None  # type: ignore[valid-type]
    moderation: neutral() = None  # type: ignore[valid-type]
    reasoning_effort: neutral("none") = None  # type: ignore[valid-type]
    verbosity: neutral("medium") = None  # type: ignore[valid-type]
    web_search_options: neutral() = None  # type: ignore[valid-type]
    store: neutral(False) = None  # type: ignore[valid-type]
    metadata: dict[str, Text] | None = Field(default=None, description="Not read.")
    service_tier: neutral("auto", "default") = None  # type: ignore[valid-type]
    safety_identifier: Text | None = Field(default=None, description="Not read.")
    prompt_cache_key: Text | None = Field(default=None, description="Not read.")
    prompt_cache_options: neutral() = None  # type: ignore[valid-type]
    prompt_cache_retention: neutral("in_memory") = None  # type: ignore[valid-type]
