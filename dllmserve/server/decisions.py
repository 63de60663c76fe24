"""OpenAI's decisions: typed questions about an input, answered with probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, WithJsonSchema
from starlette.requests import Request as HttpRequest

from dllmserve.core.request import Request
from dllmserve.decisions.answers import Cost, decision
from dllmserve.decisions.inputs import read_input
from dllmserve.decisions.questions import MAX_QUESTIONS, Question, read_questions
from dllmserve.decisions.reading import MAX_ORDERS, How
from dllmserve.outputs import RequestOutput
from dllmserve.server.common import (
    JsonRoute,
    OwnerOf,
    ServiceOf,
    errors,
    free_body,
    note,
    note_prompts,
)
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import Body, Entries, Text, example
from dllmserve.server.http.escape import shown
from dllmserve.server.openai_bodies import Unread
from dllmserve.server.service import Service, close_all, finish_all
from dllmserve.server.sse import unless_gone

router = APIRouter(tags=["decisions"], route_class=JsonRoute)


class ReadingFields(Body):
    """How questions are read: of both endpoints."""

    reading: Literal["parallel", "sequential"] | None = Field(
        default=None,
        description="parallel (the default): all questions in one forward, none sees the answer to "
        "another. sequential: each sees the answers to those before it, a forward for each.",
    )
    orders: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ORDERS,
        description="Average each question over so many orders of its options; 1 by default.",
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=86400,
        allow_inf_nan=False,
        description="Seconds that the request may take; the server's own limit stays.",
    )

    def how(self) -> How:
        """The options."""
        return How(self.reading or "parallel", self.orders or 1)


# read by dllmserve.decisions, whose errors name places inside of them
_Input = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object"}, "minItems": 1},
            ],
            "description": "A text, or messages, calls of tools and their outputs.",
        }
    ),
]
_Questions = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "object"},
            "minItems": 1,
            "maxItems": MAX_QUESTIONS,
            "description": "Predicates, choices and scores.",
        }
    ),
]


class DecisionRequest(ReadingFields):
    """Body of /v1/decisions."""

    model_config = example(
        input="The parcel arrived with a broken lid.",
        questions=[
            {"type": "predicate", "instructions": "Something is broken."},
            {
                "type": "choice",
                "instructions": "Which team should handle this?",
                "choices": [{"value": "billing"}, {"value": "shipping"}],
            },
        ],
    )

    input: _Input
    questions: _Questions
    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    # of no meaning here, whatever their value
    prompt_cache_key: Unread[Text] = None
    prompt_cache_options: Unread[Entries[Any]] = None
    safety_identifier: Unread[Text] = None


class Chance(BaseModel):
    """The probability of an option; ``label`` of a level, whose number is ``value``."""

    value: str | bool | int
    probability: float
    label: str | None = None


class Answer(BaseModel):
    """What is there depends on the type."""

    type: Literal["predicate", "choice", "score"]
    name: str | None
    probability: float | None = None
    choice: str | bool | None = None
    score: float | None = None
    confidence: float | None = None
    probabilities: list[Chance] | None = None


class InputDetails(BaseModel):
    """Of the input."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Of the output."""

    reasoning_tokens: int


class DecisionUsage(BaseModel):
    """What the answers cost."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Decision(BaseModel):
    """Answers in the order of the questions."""

    model: str
    answers: list[Answer]
    usage: DecisionUsage


@router.post(
    "/v1/decisions",
    response_model=None,
    responses={**errors(404, 504), 200: {"model": Decision, "description": "The answers."}},
)
async def decisions(
    body: DecisionRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Answer typed questions about an input with probabilities."""
    check_model(body.model, service)
    given, questions = read_input(body.input), read_questions(body.questions)
    body.input = body.questions = None
    free_body(http)
    found, cost = await answered(body, given, questions, http, service, owner)
    return JSONResponse(decision(service.model_name, questions, found, cost))


async def answered(
    body: ReadingFields,
    given: str,
    questions: Sequence[Question],
    http: HttpRequest,
    service: Service,
    owner: str,
) -> tuple[list[list[float]], Cost]:
    """Probabilities of all options, and what they cost; the log's line gets its facts.

    Raises:
        DllmServeError: the questions cannot be read here, there is no room, or time is over.
    """
    note_prompts(http, service, given)
    service.require_engine(owner)
    llm, config = service.llm, service.settings.server
    now = asyncio.get_running_loop().time
    until = now() + min(config.request_timeout, body.timeout or config.request_timeout)

    async def outputs(requests: list[Request]) -> list[RequestOutput]:
        left = max(until - now(), 0.001)  # over all rounds
        runs = service.admit(requests, owner, timeout_s=left)
        try:
            return await finish_all(runs)
        finally:
            close_all(runs)

    deciding = llm.decider.answer(
        given, questions, body.how(), llm.check, outputs, at_once=config.max_prompts
    )
    found, cost = await unless_gone(http, deciding)
    facts = {"prompt_tokens": cost.input_tokens, "completion_tokens": cost.output_tokens}
    note(http, questions=len(questions), **facts)
    return found, cost


def check_model(name: str | None, service: Service) -> None:
    """Refuse the name of another model, as OpenAI words it."""
    if name is not None and name != service.model_name:
        text = f"The model `{shown(name, 100)}` does not exist"
        kind = "invalid_request_error"  # as OpenAI has it
        raise ApiError(404, text, code="model_not_found", param="model", type=kind)
