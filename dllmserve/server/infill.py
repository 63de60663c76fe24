"""Infilling: the templates of ``LLM.infill`` over HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from dllmserve._values import MAX_CHOICES, MAX_GEN_LENGTH
from dllmserve.holes import Hole
from dllmserve.server.common import (
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    free_body,
    note_prompts,
    note_runs,
)
from dllmserve.server.fields import (
    Body,
    Choice,
    Listed,
    NativeFields,
    Text,
    TokenId,
    example,
    given,
)
from dllmserve.server.native import Usage
from dllmserve.server.sse import unless_gone

router = APIRouter(tags=["native"], route_class=JsonRoute)

#: most pieces of a template
MAX_PIECES = 4096
MAX_NAME = 64


class HoleFields(Body):
    """A part of the template that the model fills."""

    hole: int = Field(ge=1, le=MAX_GEN_LENGTH, description="Its length in tokens.")
    name: Annotated[Text, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="Its name in the answer."
    )
    fill: Literal["exact", "up_to"] | None = Field(
        default=None, description="up_to: the first end id ends it. Else exact."
    )
    regex: Text | None = Field(default=None, description="Its text matches this.")
    json_schema: dict[str, Any] | Text | None = Field(
        default=None, description="Its text is JSON that is valid by this schema."
    )
    choice: Annotated[Listed[Choice], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        default=None, description="Its text is one of these."
    )

    def made(self) -> Hole:
        """The hole."""
        fields = given(self)
        return Hole(fields.pop("hole"), **fields)


Ids = Annotated[Listed[TokenId], Field(json_schema_extra={"x-takes": "a list of token ids"})]
Piece = Annotated[
    Text | Ids | HoleFields,
    Field(
        json_schema_extra={
            "x-takes": 'a text, a list of token ids, or a hole such as {"hole": 8}',
        }
    ),
]


class InfillRequest(NativeFields):
    """A template."""

    model_config = example(
        template=["The ", {"hole": 2, "name": "who"}, " of the United States"], temperature=0
    )

    template: Annotated[Listed[Piece], Field(min_length=1, max_length=MAX_PIECES)] = Field(
        description="Texts, lists of token ids, and holes."
    )

    def pieces(self) -> list[Any]:
        """The template as :meth:`dllmserve.LLM.infill` takes it."""
        return [p.made() if isinstance(p, HoleFields) else p for p in self.template]


class HoleAnswer(BaseModel):
    """What a hole was filled with."""

    name: str | None
    text: str
    token_ids: list[int]
    steps: list[int]
    logprobs: list[dict[str, Any]] | None = None


class InfillAnswer(BaseModel):
    """The whole, and its holes; logprobs are there only if they were asked for."""

    text: str
    token_ids: list[int]
    holes: list[HoleAnswer]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    steps: list[int]
    logprobs: list[dict[str, Any]] | None = None


@router.post("/v1/infill", response_model=InfillAnswer, responses=errors(504))
async def infill(
    body: InfillRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Fill the holes of a template."""
    free_body(http)
    note_prompts(http, service, body.template)
    params = body.sampling_params()
    row, holes = await service.template_row(body.pieces(), owner=owner)
    await service.llm.prepare(params, holes)
    request = service.llm.check(row, params, holes=holes, name="template")
    (run,) = service.admit([request], owner, timeout_s=body.timeout)
    try:
        output = await unless_gone(http, run.output())
    finally:
        run.close()
    note_runs(http, [run], output.completion_tokens)
    answer = output.as_dict()
    answer["usage"]["queue_time"] = run.queue_time
    return JSONResponse(answer)
