"""llama.cpp's /infill, which editors ask for the text at the cursor."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.core.rows import ends_of
from dllmserve.outputs import RequestOutput
from dllmserve.server.common import (
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    events,
    free_body,
    note_prompts,
    note_runs,
)
from dllmserve.server.failures import ApiError, as_api_error, log_failure
from dllmserve.server.fields import Body, Listed, Text, example, neutral
from dllmserve.server.gap import before_ids, behind_ids, in_gap
from dllmserve.server.openai import check_stream
from dllmserve.server.openai_bodies import OpenAIFields, Unread
from dllmserve.server.service import Run, Service
from dllmserve.server.sse import EventStream, event, unless_gone

router = APIRouter(tags=["llama.cpp"], route_class=JsonRoute)

#: most pieces of other files, and most fields that are asked for
MAX_EXTRA = 1024


def _unread() -> Any:
    return Field(default=None, description="Not read.")


class Extra(Body):
    """A piece of another file."""

    filename: Text | None = None
    text: Text
    time: Unread[int] = _unread()


class LlamaInfillRequest(OpenAIFields):
    """Body of /infill."""

    model_config = example(
        input_prefix="def add(a, b):\n", input_suffix="\n    return c\n", n_predict=16
    )

    input_prefix: Text = Field(description="What stands before the cursor's line.")
    input_suffix: Text = Field(description="What stands behind the cursor.")
    prompt: Text | None = Field(
        default=None, description="What stands between input_prefix and the cursor."
    )
    input_extra: Annotated[Listed[Extra], Field(max_length=MAX_EXTRA)] | None = Field(
        default=None, description="Pieces of other files, which go before input_prefix."
    )
    n_predict: int | None = Field(
        default=None,
        ge=-2,
        le=MAX_GEN_LENGTH,
        description="As max_tokens; below 0 the server's default, 0 for nothing at all.",
    )
    response_fields: Annotated[Listed[Text], Field(max_length=MAX_EXTRA)] | None = Field(
        default=None, description="Fields of the answer that are wanted, such as content."
    )
    n: neutral(1) = None  # type: ignore[valid-type]
    stream_options: neutral() = None  # type: ignore[valid-type]
    repeat_penalty: neutral(1) = None  # type: ignore[valid-type]
    # about slots, caches and samplers of that server
    id_slot: Unread[int] = _unread()
    cache_prompt: Unread[bool] = _unread()
    samplers: Unread[Annotated[Listed[Text], Field(max_length=MAX_EXTRA)]] = _unread()
    n_indent: Unread[int] = _unread()
    t_max_prompt_ms: Unread[int] = _unread()
    t_max_predict_ms: Unread[int] = _unread()

    def length(self) -> int | None:
        """The answer's length, if it was given under any of its names."""
        asked = None if self.n_predict is None or self.n_predict < 0 else self.n_predict
        found = super().length()
        if asked is not None and found is not None and asked != found:
            raise ApiError(
                400,
                f"n_predict={asked} and max_tokens={found} contradict each other: give one",
                code="invalid_parameter",
                param="n_predict",
            )
        return found if asked is None else asked

    def before(self) -> str:
        """All that stands before the cursor."""
        parts = []
        for extra in self.input_extra or ():
            head = f"{extra.filename}\n" if extra.filename else ""
            parts.append(f"{head}{extra.text}\n\n")
        return "".join((*parts, self.input_prefix, self.prompt or ""))


class Timings(BaseModel):
    """Numbers of tokens, and how long they took."""

    prompt_n: int
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class LlamaInfillAnswer(BaseModel):
    """Answer of /infill, as far as there is something to tell."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool
    has_new_line: bool
    stop_type: Literal["eos", "word", "limit", "none"]
    stopping_word: str
    timings: Timings


_RESPONSES: dict[int | str, dict[str, Any]] = {
    **errors(504),
    200: {
        "model": LlamaInfillAnswer,
        "description": "The text at the cursor; with stream=true, events with its pieces.",
        "content": events("JSON: a piece with stop=false, the answer, or an error object."),
    },
}


@router.post("/infill", response_model=None, responses=_RESPONSES)
async def infill(
    body: LlamaInfillRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Insert text at a cursor."""
    check_stream(body, service)
    free_body(http)
    text = body.before()
    note_prompts(http, service, [text, body.input_suffix])
    before = await before_ids(service, text, "input_prefix", owner)
    behind = await behind_ids(service, body.input_suffix, "input_suffix", owner)
    if body.n_predict == 0:  # to fill a cache, which is none of this server's
        return JSONResponse(_wanted(body, _nothing(service, len(before) + len(behind))))
    config, constraint = service.settings.server, body.constraint()
    with body.own_names():
        given = len(before) + len(behind)
        choice = body.sampling_params(given, service.llm.info, config, constraint)
        name = "the text around the cursor"
        requests = await in_gap(service.llm, before, behind, [choice(0)], name)
    (run,) = service.admit(requests, owner, stream=bool(body.stream), timeout_s=body.timeout)
    if body.stream:
        return EventStream(_pieces(body, run, http, service), config.sse_keep_alive, run.close)
    try:
        output = await unless_gone(http, run.output())
    finally:
        run.close()
    note_runs(http, [run], output.completion_tokens)
    return JSONResponse(_wanted(body, _answer(service, run, output.answer)))


async def _pieces(
    body: LlamaInfillRequest, run: Run, http: HttpRequest, service: Service
) -> AsyncGenerator[bytes, None]:
    """Events with pieces of committed text; the last one is the answer without its text."""
    output: RequestOutput | None = None
    try:
        async for delta in run.text():
            if delta.text:
                piece = {"index": 0, "content": delta.text, "tokens": [], "stop": False}
                yield event(piece)
            output = delta.output
        if output is not None:
            yield event(_wanted(body, _answer(service, run, output) | {"content": ""}))
    except Exception as failure:
        log_failure(failure)
        error = as_api_error(failure)
        yield event({"error": {"code": error.status, "message": error.message}})
    finally:
        run.close()
        note_runs(http, [run], output.completion_tokens if output is not None else 0)


def _nothing(service: Service, evaluated: int) -> dict[str, Any]:
    timings = Timings(
        prompt_n=evaluated,
        predicted_n=0,
        predicted_ms=0.0,
        predicted_per_token_ms=0.0,
        predicted_per_second=0.0,
    )
    return LlamaInfillAnswer(
        index=0,
        content="",
        tokens=[],
        stop=True,
        model=service.model_name,
        tokens_predicted=0,
        tokens_evaluated=evaluated,
        tokens_cached=0,
        truncated=False,
        has_new_line=False,
        stop_type="limit",
        stopping_word="",
        timings=timings,
    ).model_dump()


def _answer(service: Service, run: Run, output: RequestOutput) -> dict[str, Any]:
    """The answer of a run that has ended."""
    count, started = output.completion_tokens, run.call.started
    ms = 0.0 if started is None else 1000 * (time.monotonic() - started)
    kind, word = _stopped_by(service, run, output)
    return _nothing(service, output.prompt_tokens) | {
        "content": output.text,
        "tokens_predicted": count,
        "tokens_cached": output.cached_tokens,
        "has_new_line": "\n" in output.text,
        "stop_type": kind,
        "stopping_word": word,
        "timings": {
            "prompt_n": output.prompt_tokens,
            "predicted_n": count,
            "predicted_ms": round(ms, 3),
            "predicted_per_token_ms": round(ms / count, 3) if count else 0.0,
            "predicted_per_second": round(1000 * count / ms, 3) if ms else 0.0,
        },
    }


def _stopped_by(service: Service, run: Run, output: RequestOutput) -> tuple[str, str]:
    """llama.cpp's word for why an answer ended, and the stop string that ended it."""
    params, tokenizer = run.request.params, service.llm.tokenizer
    if output.finish_reason != "stop":
        return "limit", ""
    if params.stop_strings and tokenizer is not None:
        whole = tokenizer.decode(output.token_ids)
        found = [word for word in params.stop_strings if whole.startswith(word, len(output.text))]
        if found:
            return "word", found[0]
    ends = ends_of(params, service.llm.info.spec)
    return ("eos" if output.token_ids[-1:] and output.token_ids[-1] in ends else "none"), ""


def _wanted(body: LlamaInfillRequest, answer: dict[str, Any]) -> dict[str, Any]:
    """The fields that were asked for; ``a/b`` is field b of a, under that name."""
    if not body.response_fields:
        return answer
    found = {}
    for name in body.response_fields:
        value: Any = answer
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found
