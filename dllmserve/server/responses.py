"""/v1/responses: OpenAI's newer form of chats, which may be kept and gone on from."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from dllmserve.errors import InvalidRequestError, JobStoreError
from dllmserve.outputs import TextDelta
from dllmserve.server.common import (
    JobsOf,
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    events,
    free_body,
    note_runs,
)
from dllmserve.server.failures import ApiError
from dllmserve.server.http.escape import shown
from dllmserve.server.jobs import Jobs
from dllmserve.server.openai import check_model, check_stream, prepared
from dllmserve.server.responses_answers import ResponseWriter, frame_of, response_events
from dllmserve.server.responses_bodies import ResponsesRequest
from dllmserve.server.sse import EventStream, unless_gone
from dllmserve.server.store import MAX_JOB_ID, Stored

router = APIRouter(tags=["openai"], route_class=JsonRoute)

_ID = re.compile(r"resp_([0-9a-f]{14})")
_ITEM = re.compile(r"(?:msg|fc)_([0-9a-f]{14})([0-9a-f]{4})")
#: names of a chat's fields -> what they are called here, for errors
_NAMES = {
    "messages": "input",
    "response_format": "text",
    "max_completion_tokens": "max_output_tokens",
}
_EVENTS = events("JSON: an event of OpenAI's, with its type and its number.")
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **errors(404, 504),
    200: {
        "description": "The response; with stream=true, events with its parts.",
        "content": _EVENTS,
    },
}
ResponseId = Annotated[str, Path(max_length=64, description="As resp_0123456789abcd.")]


class Kept(msgspec.Struct, frozen=True):
    """A stored response.

    Attributes:
        response: as it was answered.
        before: items of the responses that it goes on from, and their output.
        items: items that came with it.
    """

    response: dict[str, Any]
    before: list[dict[str, Any]]
    items: list[dict[str, Any]]

    def all(self) -> list[dict[str, Any]]:
        """All items up to the end of the response."""
        return [*self.before, *self.items, *self.response["output"]]


@router.post("/v1/responses", response_model=None, responses=_RESPONSES)
async def create(
    body: ResponsesRequest, http: HttpRequest, service: ServiceOf, jobs: JobsOf, owner: OwnerOf
) -> Response:
    """Answer an input."""
    check_model(body.model, service)
    free_body(http)
    before = await _before(body, jobs, owner)
    items = [await _referred(item, jobs, owner) for item in body.items()]
    with _own_names():
        chat = body.chat([*before, *items])
        check_stream(chat, service)
        requests, reply = await prepared(chat, http, service, owner)
    id = f"resp_{secrets.randbelow(MAX_JOB_ID + 1):014x}"
    writer = ResponseWriter(frame_of(body, id, service.model_name), reply)

    async def keep(response: dict[str, Any]) -> None:
        if body.store is not False:
            kept = msgspec.json.encode(Kept(response, before, items))
            await jobs.keep(_number(id), _drawer(owner), kept)

    stream = bool(body.stream)
    (run,) = service.admit(requests, owner, stream=stream, timeout_s=body.timeout)
    if stream:
        told = response_events(writer, run, http, keep)
        return EventStream(told, service.settings.server.sse_keep_alive, run.close)
    try:
        output = await unless_gone(http, run.output())
    finally:
        run.close()
    note_runs(http, [run], output.completion_tokens)
    whole = TextDelta(output.text, output.completion_tokens, output, output.logprobs)
    for _ in writer.add(whole):
        pass
    writer.end(output)
    await keep(writer.response)
    return JSONResponse(writer.response)


@router.get("/v1/responses/{response_id}", responses=errors(400, 404, 503, body=False))
async def get(response_id: ResponseId, jobs: JobsOf, owner: OwnerOf) -> dict[str, Any]:
    """A stored response."""
    return (await _there(response_id, jobs, owner)).response


@router.get("/v1/responses/{response_id}/input_items", responses=errors(400, 404, 503, body=False))
async def input_items(
    response_id: ResponseId,
    jobs: JobsOf,
    owner: OwnerOf,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=64)] = None,
    include: Annotated[list[str] | None, Query(max_length=64, description="Not read.")] = None,
) -> dict[str, Any]:
    """The items that a response was the answer to."""
    del include
    kept = await _there(response_id, jobs, owner)
    own = response_id.removeprefix("resp_")
    found = [
        {"id": f"in_{own}{place:04x}", "status": "completed", **item}
        for place, item in enumerate(kept.items)
    ]
    if order == "desc":
        found.reverse()
    if after is not None:
        places = [place for place, item in enumerate(found) if item["id"] == after]
        if not places:
            raise ApiError(400, f"there is no item '{shown(after, 64)}'", param="after")
        found = found[places[0] + 1 :]
    page = found[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > len(page),
    }


@router.delete("/v1/responses/{response_id}", responses=errors(400, 404, 503, body=False))
async def delete(response_id: ResponseId, jobs: JobsOf, owner: OwnerOf) -> dict[str, Any]:
    """Drop a stored response."""
    found = _ID.fullmatch(response_id)
    if not found or await jobs.delete(int(found[1], 16), _drawer(owner)) is not True:
        raise _unknown(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def _drawer(owner: str) -> str:
    """Whose responses are in the store: apart from the owner's jobs, which have numbers, too."""
    return f"{owner}/responses"


def _number(id: str) -> int:
    return int(id.removeprefix("resp_"), 16)


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"there is no response '{shown(id, 64)}'", code="not_found")


async def _there(id: str, jobs: Jobs, owner: str) -> Kept:
    """A stored response. Raises ApiError: it is not there, or not any more."""
    found = _ID.fullmatch(id)
    stored = await jobs.find(int(found[1], 16), _drawer(owner), 0) if found else None
    if not isinstance(stored, Stored) or stored.result is None or stored.result.error:
        raise _unknown(id)
    try:
        return msgspec.json.decode(stored.result.details, type=Kept)
    except msgspec.MsgspecError as error:
        raise JobStoreError(f"a stored response is damaged: {error}") from error


async def _before(body: ResponsesRequest, jobs: Jobs, owner: str) -> list[dict[str, Any]]:
    """Items of the responses that this one goes on from."""
    if body.previous_response_id is None:
        return []
    try:
        return (await _there(body.previous_response_id, jobs, owner)).all()
    except ApiError as error:
        raise ApiError(
            400,
            f"{error.message}: it was not stored, was deleted, or its time is over",
            code="previous_response_not_found",
            param="previous_response_id",
        ) from error


async def _referred(item: dict[str, Any], jobs: Jobs, owner: str) -> dict[str, Any]:
    """The item itself, or the item of a stored response that it refers to."""
    if item["type"] != "item_reference":
        return item
    if found := _ITEM.fullmatch(item["id"]):
        try:
            output = (await _there(f"resp_{found[1]}", jobs, owner)).response["output"]
        except ApiError:
            output = []
        for there in output:
            if there["id"] == item["id"]:
                return dict(there)
    raise ApiError(
        400,
        f"there is no item '{shown(item['id'], 64)}' in the stored responses: send it whole",
        code="item_not_found",
        param="input",
    )


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors inside of it call the fields of a chat as they are called here."""
    try:
        yield
    except (ApiError, InvalidRequestError) as error:
        text, param = str(error), getattr(error, "param", None)
        for name, own in _NAMES.items():
            if param == name or text.startswith((f"{name} ", f"{name}=", f"{name}.", f"{name}[")):
                status = getattr(error, "status", 400)
                text = own + text.removeprefix(name) if text.startswith(name) else text
                raise ApiError(status, text, code=error.code, param=own) from error
        raise
