"""The OpenAI endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from dllmserve.core.request import Request
from dllmserve.engine.tool_form import OWN
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
from dllmserve.server.failures import ApiError
from dllmserve.server.gap import before_ids, behind_ids, in_gap
from dllmserve.server.http.escape import shown
from dllmserve.server.openai_answers import ChatAnswer, CompletionAnswer, Reply, stream
from dllmserve.server.openai_bodies import (
    ChatRequest,
    CompletionRequest,
    OpenAIFields,
    conversation_of,
    template_variables,
)
from dllmserve.server.service import Service, close_all, finish_all
from dllmserve.server.sse import EventStream, unless_gone
from dllmserve.server.tool_calls import Calls
from dllmserve.server.tools import told_tools

router = APIRouter(tags=["openai"], route_class=JsonRoute)

_EVENTS = events("JSON: a piece of the answer, or an error object; [DONE] at the end.")


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelNote(BaseModel):
    """A model, as clients of System One read it; its date is the server's start."""

    name: str
    description: str
    release_date: str


class ModelList(BaseModel):
    """All models: one, in the shapes of two kinds of clients."""

    object: Literal["list"]
    data: list[ModelCard]
    models: list[ModelNote]


def _responses(kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    text = "The answer; with stream=true, events with its pieces."
    return {**errors(404, 504), 200: {"model": kind, "description": text, "content": _EVENTS}}


@router.post("/v1/completions", response_model=None, responses=_responses(CompletionAnswer))
async def completions(
    body: CompletionRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Complete prompts."""
    check_model(body.model, service)
    check_stream(body, service)
    free_body(http)
    prompts = body.prompts()
    note_prompts(http, service, prompts)
    _check_count(len(prompts) * body.choices(service.settings.server), "prompt", service)
    behind = await behind_ids(service, body.suffix, "suffix", owner) if body.suffix else []
    ids = []
    for index, prompt in enumerate(prompts):
        name = _named("prompt", index, len(prompts))
        if body.suffix:
            ids.append(await before_ids(service, prompt, name, owner))
        else:
            ids.append(await service.prompt_ids(prompt, name, owner))
    tokenizer = service.llm.tokenizer
    echoes: list[str] = []
    if body.echo:
        echoes = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt) if tokenizer else ""
            for prompt in prompts
        ]
    constraint = body.constraint()
    requests = await _requests(body, ids, service, constraint, behind=behind)
    reply = reply_to(body, service, constraint, echoes=echoes)
    return await _answer(body, requests, reply, http, service, owner)


@router.post("/v1/chat/completions", response_model=None, responses=_responses(ChatAnswer))
async def chat(
    body: ChatRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Answer a conversation."""
    check_model(body.model, service)
    check_stream(body, service)
    free_body(http)
    _check_count(body.choices(service.settings.server), "n", service)
    requests, reply = await prepared(body, http, service, owner)
    return await _answer(body, requests, reply, http, service, owner)


async def prepared(
    body: ChatRequest, http: HttpRequest, service: Service, owner: str
) -> tuple[list[Request], Reply]:
    """The checked requests of a chat, one for each choice, and the frame of its answer.

    Raises:
        ApiError, DllmServeError: it cannot be answered.
    """
    messages = conversation_of(body.messages)
    note_prompts(http, service, messages)
    use, constraint, tokenizer = body.tool_use(), body.constraint(), service.llm.tokenizer
    tools, variables = (
        None if use is None else told_tools(use.functions),
        template_variables(body.chat_template_kwargs),
    )
    ids = await service.chat_ids(messages, owner, tools, variables, body.continues())
    calls, field = None, None
    if use is not None:
        field = "functions" if use.older else "tools"
        calls = Calls(OWN if tokenizer is None else tokenizer.tool_form, use.allowed, use.older)
    reply = reply_to(body, service, constraint, calls=calls)
    if use is not None and calls is not None:
        constraint = use.constraint(calls.form, constraint)
    return await _requests(body, [ids], service, constraint, field), reply


def reply_to(
    body: OpenAIFields,
    service: Service,
    constraint: dict[str, Any],
    *,
    echoes: Sequence[str] = (),
    calls: Calls | None = None,
) -> Reply:
    """The frame of an answer; ``constraint`` is what its text has to match."""
    options = body.stream_options
    return Reply(
        chat=isinstance(body, ChatRequest),
        model=service.model_name,
        choices=body.choices(service.settings.server),
        echoes=echoes,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        calls=calls,
        whole_texts="json_schema" in constraint or "choice" in constraint,
        top_logprobs=body.likeliest(),
        tokenizer=service.llm.tokenizer,
    )


async def _answer(
    body: OpenAIFields,
    requests: list[Request],
    reply: Reply,
    http: HttpRequest,
    service: Service,
    owner: str,
) -> Response:
    runs = service.admit(requests, owner, stream=bool(body.stream), timeout_s=body.timeout)
    if body.stream:
        keep_alive = service.settings.server.sse_keep_alive
        return EventStream(stream(reply, runs, http), keep_alive, lambda: close_all(runs))
    try:
        outputs = await unless_gone(http, finish_all(runs))
    finally:
        close_all(runs)
    note_runs(http, runs, sum(output.completion_tokens for output in outputs))
    return JSONResponse(reply.whole(runs, [output.answer for output in outputs]))


async def _requests(
    body: OpenAIFields,
    prompts: list[list[int]],
    service: Service,
    constraint: dict[str, Any],
    tools: str | None = None,
    behind: Sequence[int] = (),
) -> list[Request]:
    """Checked requests: every choice of every prompt.

    Args:
        body, prompts, service: what is asked.
        constraint: what answers have to match.
        tools: the field that has tools.
        behind: ids that stand behind each answer.
    """
    config, llm = service.settings.server, service.llm
    choices = body.choices(config)
    requests = []
    for index, ids in enumerate(prompts):
        name = "messages" if isinstance(body, ChatRequest) else "prompt"
        name = _named(name, index, len(prompts))
        with body.own_names(tools):
            found = body.sampling_params(len(ids) + len(behind), llm.info, config, constraint)
            params = [found(i) for i in range(choices)]
            if behind:
                name = f"{name} with its suffix"
                requests += await in_gap(llm, ids, [*behind], params, name)
                continue
            await llm.prepare(params[0])
            requests += [llm.check(ids, choice, name=name) for choice in params]
    return requests


def _named(name: str, index: int, count: int) -> str:
    """What errors call one of several prompts."""
    return name if count == 1 else f"{name}[{index}]"


def check_stream(body: OpenAIFields, service: Service) -> None:
    """Raise ApiError if the answer cannot come in the way that is asked for."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400,
            "stream_options needs stream=true",
            code="invalid_parameter",
            param="stream_options",
        )
    if body.stream and service.llm.tokenizer is None:
        raise ApiError(
            400,
            "stream needs a tokenizer, and this checkpoint has none; /v1/generate/stream tells "
            "token ids",
            code="invalid_parameter",
            param="stream",
        )


def check_model(name: str | None, service: Service) -> None:
    """Raise ApiError for a model that is not served."""
    if name is not None and name != service.model_name:
        known = f"this server has '{service.model_name}'"
        text = f"there is no model '{shown(name, 100)}'; {known}"
        if not name.strip():
            text = f"model is empty; {known}, which is also meant if no model is given"
        raise ApiError(404, text, code="model_not_found", param="model")


def _check_count(count: int, param: str, service: Service) -> None:
    limit = service.settings.server.max_prompts
    if count > limit:
        raise ApiError(
            400,
            f"{param} asks for {count} answers, over max_prompts={limit}: ask for fewer at a time",
            code="invalid_parameter",
            param=param,
        )


@router.get("/v1/models", response_model=ModelList, responses=errors(400, body=False))
async def models(service: ServiceOf) -> dict[str, Any]:
    """The model of this server."""
    return {"object": "list", "data": [_card(service)], "models": [_note(service)]}


@router.get(
    "/v1/models/{model:path}", response_model=ModelCard, responses=errors(400, 404, body=False)
)
async def model(model: str, service: ServiceOf) -> dict[str, Any]:
    """One model."""
    check_model(model, service)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    info = service.llm.fleet.info
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "dllmserve",
        "max_model_len": None if info is None else info.limits.max_model_len,
    }


def _note(service: Service) -> dict[str, Any]:
    info = service.llm.fleet.info
    return {
        "name": service.model_name,
        "description": "a model that is being loaded" if info is None else info.spec.architecture,
        "release_date": datetime.fromtimestamp(service.created, UTC).date().isoformat(),
    }
