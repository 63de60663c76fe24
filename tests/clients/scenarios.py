"""What the scenarios of all clients share: where the server is, and what they ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, Field


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: without /v1.
        model: its model's name.
    """

    url: str
    model: str

    @property
    def base_url(self) -> str:
        """What clients of OpenAI's API are given."""
        return f"{self.url}/v1"


#: plays one scenario and asserts what came of it
Scenario = Callable[[Target], None]
#: what asks for a length that small models need not fill
SHORT = 24
LONG = 200
QUESTION = "Sort the numbers: 9 41 7"
#: clients do not send keys if they have none
KEY = "none"


class Mood(Enum):
    """One of several."""

    GOOD = "good"
    BAD = "bad"


class Place(BaseModel):
    """A part of an answer."""

    town: str = Field(max_length=12)


class Person(BaseModel):
    """A typed answer, with what schemas of real programs have: bounds, enums, parts, null."""

    name: str = Field(max_length=12, description="The first name.")
    age: int = Field(ge=0, le=120)
    mood: Mood
    place: Place
    tags: list[Mood] = Field(max_length=3)
    note: bool | None


class Sum(BaseModel):
    """Arguments of the tool."""

    a: int = Field(ge=0, le=99)
    b: int = Field(ge=0, le=99)


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": Sum.model_json_schema(),
    },
}


def added(arguments: str) -> str:
    """What the tool answers. Raises ValueError for arguments that its schema does not allow."""
    given = Sum.model_validate_json(arguments)
    return str(given.a + given.b)
