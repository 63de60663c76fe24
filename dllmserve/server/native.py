"""The native API: submit and poll, and a stream of canvases for people who want to watch."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from functools import cache
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.process.calls import Started
from dllmserve.server.common import (
    JobsOf,
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    events,
    free_body,
    note,
    note_prompts,
    note_runs,
)
from dllmserve.server.failures import ApiError, as_api_error, log_failure
from dllmserve.server.fields import Listed, NativeFields, Prompt, example
from dllmserve.server.jobs import MAX_WAIT_S, details_of
from dllmserve.server.service import Run, Service
from dllmserve.server.sse import EventStream, event, unless_gone
from dllmserve.server.store import MAX_JOB_ID, Gone, Stored

router = APIRouter(tags=["native"], route_class=JsonRoute)

#: paths that clients ask again and again for a result; GET there, and below, is not metered
POLLED = ("/v1/result",)

#: most prompts that any server takes at once; --max-prompts is at most this
MAX_PROMPTS = 1024
_PLAIN_ID = re.compile(r"0|[1-9][0-9]{0,15}")


class GenerateRequest(NativeFields):
    """One prompt."""

    model_config = example(prompt="The president", gen_length=32, steps=32, temperature=0)

    prompt: Prompt = Field(description="A text, or token ids.")


class BatchRequest(NativeFields):
    """Several prompts with the same settings."""

    model_config = example(
        prompts=["The president", "The people"], gen_length=32, steps=32, temperature=0
    )

    prompts: Listed[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS)


class Submitted(BaseModel):
    """Accepted jobs."""

    request_ids: list[int]
    status: Literal["submitted"]


class Usage(BaseModel):
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    forward_passes: int
    cached_tokens: int
    edits: int
    queue_time: float | None = None


class Logprob(BaseModel):
    """Log-probabilities at a position of an answer, by the forward that wrote it."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


class ResultAnswer(BaseModel):
    """A job: the fields from ``error`` on are there only where they apply."""

    request_id: int
    status: Literal["running", "finished", "failed", "cancelled"]
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    steps: list[int] | None = None
    logprobs: list[Logprob] | None = None
    usage: Usage | None = None


#: for tools that read /openapi.json: where the ids of an answer lead
_ID = {"parameters": {"request_id": "$response.body#/request_ids/0"}}
_LINKS: dict[int | str, dict[str, Any]] = {
    200: {
        "links": {
            "result": {**_ID, "operationId": "result_v1_result__request_id__get"},
            "delete": {**_ID, "operationId": "delete_v1_result__request_id__delete"},
        }
    }
}


@router.post("/v1/generate", response_model=Submitted, responses={**errors(), **_LINKS})
async def generate(
    body: GenerateRequest, http: HttpRequest, service: ServiceOf, jobs: JobsOf, owner: OwnerOf
) -> Response:
    """Accept one prompt; ask for the answer under /v1/result/{request_id}."""
    ids = await _submit(body, [body.prompt], http, service, jobs, owner)
    answer = {"request_ids": ids, "status": "submitted"}
    return JSONResponse(answer, headers={"Location": f"/v1/result/{ids[0]}"})


@router.post("/v1/generate_batch", response_model=Submitted, responses={**errors(), **_LINKS})
async def generate_batch(
    body: BatchRequest, http: HttpRequest, service: ServiceOf, jobs: JobsOf, owner: OwnerOf
) -> Response:
    """Accept all prompts, or none."""
    ids = await _submit(body, body.prompts, http, service, jobs, owner)
    return JSONResponse({"request_ids": ids, "status": "submitted"})


async def _submit(
    body: NativeFields,
    prompts: list[Any],
    http: HttpRequest,
    service: Service,
    jobs: JobsOf,
    owner: str,
) -> list[int]:
    limit = service.settings.server.max_prompts
    if len(prompts) > limit:
        raise ApiError(
            400,
            f"prompts has {len(prompts)} entries, over max_prompts={limit}: send fewer at a time",
            code="invalid_parameter",
            param="prompts",
        )
    free_body(http)
    note_prompts(http, service, prompts)
    params = body.sampling_params()
    await service.llm.prepare(params)
    requests = []
    for index, prompt in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompts[{index}]"
        ids = await service.prompt_ids(prompt, name, owner)
        requests.append(service.llm.check(ids, params, name=name))
    found = await jobs.submit(requests, owner, body.timeout)
    note(http, jobs=len(found), prompt_tokens=sum(r.prompt_len for r in requests))
    return found


JobId = Annotated[int, Path(ge=0, le=MAX_JOB_ID, description="From request_ids.")]


@router.get(
    "/v1/result/{request_id}",
    response_model=ResultAnswer,
    responses=errors(400, 404, 410, 503, body=False),
)
async def result(
    request_id: JobId,
    http: HttpRequest,
    jobs: JobsOf,
    owner: OwnerOf,
    wait: Annotated[
        float,
        Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="Seconds to wait for the end."),
    ] = 0,
    details: Annotated[
        Literal["true", "false"],
        Query(description="Also finish_reason, steps, logprobs and usage."),
    ] = "false",
) -> Response:
    """What has become of a job. Reading changes nothing, so it may be repeated."""
    _check_id(http)
    finding = jobs.find(request_id, owner, wait)
    stored = _there(request_id, await (unless_gone(http, finding) if wait else finding))
    answer: dict[str, Any] = {"request_id": request_id, "status": "running", "text": None}
    found = stored.result
    if found is None:
        return JSONResponse(answer, headers={"Retry-After": "1"})
    answer |= {"status": found.status, "text": _characters(found.text)}
    if found.error is not None:
        answer["error"] = _characters(found.error)
    if details == "true" and (more := details_of(found)) is not None:
        usage = msgspec.structs.asdict(more)
        answer |= {key: usage.pop(key) for key in ("finish_reason", "steps")}
        if (logprobs := usage.pop("logprobs")) is not None:
            answer["logprobs"] = logprobs
        answer["usage"] = usage
    return JSONResponse(answer)


@router.delete(
    "/v1/result/{request_id}",
    status_code=204,
    response_class=Response,
    responses=errors(400, 404, 410, 503, body=False),
)
async def delete(request_id: JobId, http: HttpRequest, jobs: JobsOf, owner: OwnerOf) -> Response:
    """Drop a job: it is cancelled if it runs, and its result is freed."""
    _check_id(http)
    found = await jobs.delete(request_id, owner)
    if found is not True:
        _there(request_id, found if isinstance(found, Gone) else None)
    return Response(status_code=204)


def _check_id(http: HttpRequest) -> None:
    """Only the plain form of an id: no sign, blank or leading zero."""
    raw = http.scope["path"].rpartition("/")[2]
    if not _PLAIN_ID.fullmatch(raw):
        raise ApiError(
            400, f"request_id must be an integer from 0 to {MAX_JOB_ID}", param="request_id"
        )


def _characters(text: str | None) -> str | None:
    """A text of the store without lone surrogates, which no answer can hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _there(request_id: int, found: Stored | Gone | None) -> Stored:
    if isinstance(found, Stored):
        return found
    if isinstance(found, Gone):
        text = f"the result of request {request_id} is gone: it was {found.reason}"
        raise ApiError(410, text, code=f"result_{found.reason}")
    raise ApiError(404, f"there is no request {request_id}", code="not_found")


@router.post(
    "/v1/generate/stream",
    response_class=Response,
    responses={
        **errors(),
        200: {
            "description": "Events: `step` with the changed positions of the answer, then `done` "
            "with the answer, or `error`.",
            "content": events("JSON.", "started", "step", "done", "error"),
        },
    },
)
async def stream(
    body: GenerateRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Watch the answer being filled in: provisional and committed positions, step by step."""
    free_body(http)
    note_prompts(http, service, [body.prompt])
    ids = await service.prompt_ids(body.prompt, owner=owner)
    params = body.sampling_params()
    await service.llm.prepare(params)
    request = service.llm.check(ids, params)
    (run,) = service.admit([request], owner, watch=True, timeout_s=body.timeout)
    keep_alive = service.settings.server.sse_keep_alive
    return EventStream(_canvases(run, http, service), keep_alive, run.close)


async def _canvases(run: Run, http: HttpRequest, service: Service) -> AsyncGenerator[bytes, None]:
    """Events of a watched run."""
    before: CanvasStep | None = None
    output: RequestOutput | None = None
    tokenizer = service.llm.tokenizer

    @cache
    def text(token: int) -> str:
        return "" if tokenizer is None else tokenizer.decode([token])

    try:
        while output is None:
            found = await run.next()
            if isinstance(found, CanvasStep):
                yield event(_changes(before, found, text), "step")
                before = found
            elif isinstance(found, RequestOutput):
                output = found
                yield event(found.as_dict(), "done")
            elif isinstance(found, Started):
                yield event({"queue_time": run.queue_time}, "started")
    except Exception as failure:
        log_failure(failure)
        error = as_api_error(failure)
        yield event({"message": error.message, "code": error.code}, "error")
    finally:
        run.close()
        note_runs(http, [run], output.completion_tokens if output is not None else 0)


def _changes(
    before: CanvasStep | None, now: CanvasStep, text: Callable[[int], str]
) -> dict[str, Any]:
    """The positions of the answer that a step has changed; ``text`` decodes one token."""
    changed, edited = [], {*now.edited}
    for position, token in enumerate(now.token_ids):
        cell = (token, now.committed[position], now.confidence[position])
        if before is not None and cell == (
            before.token_ids[position],
            before.committed[position],
            before.confidence[position],
        ):
            continue
        if before is None and token is None:
            continue
        changed.append(
            {
                "position": position,
                "token_id": token,
                "text": "" if token is None else text(token),
                "committed": cell[1],
                "confidence": cell[2],
                **({"edited": True} if position in edited else {}),
            }
        )
    return {
        "forward_passes": now.forward_passes,
        "block": list(now.block),
        "length": len(now.token_ids),
        "changed": changed,
    }
