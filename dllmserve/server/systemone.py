"""TypeSafe's System One: the same decisions in the shapes of its clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request as HttpRequest

from dllmserve.decisions.answers import answer
from dllmserve.decisions.checks import json_text, text
from dllmserve.decisions.questions import (
    MAX_OPTIONS,
    MAX_QUESTIONS,
    Option,
    Question,
    predicate,
)
from dllmserve.errors import DecisionError
from dllmserve.server.common import JsonRoute, OwnerOf, ServiceOf, errors, free_body
from dllmserve.server.decisions import ReadingFields, answered, check_model
from dllmserve.server.failures import ApiError
from dllmserve.server.fields import Body, Entries, Listed, Text, example
from dllmserve.server.http.respond import SYSTEM_ONE

router = APIRouter(tags=["decisions"], route_class=JsonRoute)


class Told(str):
    """The text that stands for a content, which is ``given``."""

    given: Any


def _content(value: Any) -> Told:
    try:
        if isinstance(value, (str, dict, list)):
            told = Told(text(value, "") if isinstance(value, str) else json_text(value, ""))
            told.given = value
            return told
    except DecisionError as error:
        raise PydanticCustomError("content", str(error).removeprefix(": ")) from error
    raise PydanticCustomError("content_type", "Input should be a text, an object or a list")


Content = Annotated[
    Any,
    AfterValidator(_content),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "array", "items": {}}]}
    ),
]


def _named(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that no answer could hold."""
    for name in value:
        _content(name)
    return value


_Named = AfterValidator(_named)


class NoulCriteria(Body):
    """What the two answers mean."""

    true: Content | None = None
    false: Content | None = None


class Noul(Body):
    """Whether something is true."""

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: NoulCriteria | None = None

    @model_validator(mode="after")
    def _asks(self) -> Noul:
        told = self.criteria and (self.criteria.true or self.criteria.false)
        if not (self.instructions or told):
            raise PydanticCustomError(
                "missing_question", "A noul needs instructions, or criteria that describe an answer"
            )
        return self

    def question(self, name: str) -> Question:
        """In the form of all questions."""
        told = self.criteria or NoulCriteria()
        return predicate(
            self.instructions or "", name, yes=told.true or None, no=told.false or None
        )

    def answer(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """In the shape of this kind."""
        return {"type": "noul", "noul": made["probability"]}


class Choice(Body):
    """Which of some named alternatives."""

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: Annotated[
        Entries[Content | None], Field(min_length=1, max_length=MAX_OPTIONS), _Named
    ]

    def question(self, name: str) -> Question:
        """In the form of all questions."""
        options = [Option(label, told or None, label) for label, told in self.criteria.items()]
        return Question("choice", self.instructions or "", tuple(options), name)

    def answer(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """In the shape of this kind."""
        chances = {chance["value"]: chance["probability"] for chance in made["probabilities"]}
        taken = {name: made[name] for name in ("type", "choice", "confidence")}
        return {**taken, "probabilities": chances}


class Score(Body):
    """Which of some levels, from the lowest."""

    type: Literal["score"]
    instructions: Content | None = None
    criteria: Annotated[Listed[Content], Field(min_length=1, max_length=MAX_OPTIONS)]

    def question(self, name: str) -> Question:
        """In the form of all questions."""
        options = [Option(told, None, told) for told in self.criteria]
        return Question("score", self.instructions or "", tuple(options), name)

    def answer(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """In the shape of this kind."""
        levels = enumerate(made["probabilities"])
        chances = {str(level): chance["probability"] for level, chance in levels}
        taken = {name: made[name] for name in ("type", "score", "confidence")}
        legend = {str(level): told.given for level, told in enumerate(self.criteria)}
        return {**taken, "legend": legend, "probabilities": chances}


class Box(Body):
    """Where something is in a picture, which no model here can see."""

    type: Literal["box"]
    instructions: Content | None = None


_Question = Annotated[Noul | Choice | Score | Box, Field(discriminator="type")]


class SystemOneRequest(ReadingFields):
    """Body of /v1/systemone."""

    model_config = example(
        state="The parcel arrived with a broken lid.",
        questions={
            "broken": {"type": "noul", "instructions": "Is something broken?"},
            "team": {"type": "choice", "criteria": {"billing": None, "shipping": "parcels"}},
        },
    )

    state: Content
    questions: Annotated[Entries[_Question], Field(min_length=1, max_length=MAX_QUESTIONS), _Named]
    model: Text | None = Field(default=None, description="Name of the model, or nothing.")
    assets: Entries[Any] | None = Field(default=None, description="None: models read text only.")

    def asked(self) -> list[Question]:
        """The questions in the form of all questions.

        Raises:
            ApiError: one is about a picture.
        """
        if self.assets:
            raise ApiError(
                400, "assets need a vision model; this one reads text", code="unsupported_assets"
            )
        found = []
        for name, question in self.questions.items():
            if isinstance(question, Box):
                raise ApiError(
                    400, "box questions need a vision model", code="unsupported_question"
                )
            found.append(question.question(name))
        return found

    def reply(
        self, model: str, questions: Sequence[Question], chances: Sequence[Sequence[float]]
    ) -> dict[str, Any]:
        """The answer to the request, but for what it cost."""
        answers = {}
        for question, found in zip(questions, chances, strict=True):
            asked = self.questions[str(question.name)]
            if not isinstance(asked, Box):  # which was refused
                answers[question.name] = asked.answer(answer(question, found))
        return {"model": model, "answers": answers}


class Problem(BaseModel):
    """What is wrong with a body."""

    loc: list[str | int]
    msg: str
    type: str
    ctx: dict[str, Any] | None = None


class Invalid(BaseModel):
    """A body that is wrong."""

    detail: list[Problem]


class Refusal(BaseModel):
    """Why a request is refused."""

    error_type: str
    message: str


class Refused(BaseModel):
    """Every other refusal."""

    detail: Refusal


class SystemOneUsage(BaseModel):
    """What the answers cost."""

    input_tokens: int
    output_tokens: int


class SystemOneReply(BaseModel):
    """Answers by the names of their questions."""

    model: str
    answers: dict[str, dict[str, Any]]
    usage: SystemOneUsage


_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: {**found, "model": Refused} for status, found in errors(404, 504).items()},
    422: {"model": Invalid, "description": "The body is wrong; the list says where."},
    200: {"model": SystemOneReply, "description": "The answers."},
}


@router.post(SYSTEM_ONE, response_model=None, responses=_RESPONSES)
async def system_one(
    body: SystemOneRequest, http: HttpRequest, service: ServiceOf, owner: OwnerOf
) -> Response:
    """Answer named questions about a state with probabilities."""
    check_model(body.model, service)
    questions = body.asked()
    free_body(http)
    chances, cost = await answered(body, body.state, questions, http, service, owner)
    usage = {"input_tokens": cost.input_tokens, "output_tokens": cost.output_tokens}
    return JSONResponse({**body.reply(service.model_name, questions, chances), "usage": usage})
