"""Hole: a part of a template that the model fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dllmserve._checks import check_choice, check_int, check_known
from dllmserve._values import MAX_GEN_LENGTH, normal_choice, normal_schema
from dllmserve.errors import InvalidParameterError

#: how much of a hole is filled
FILLS = ("exact", "up_to")


@dataclass(frozen=True)
class Hole:
    """A part of a template that the model fills.

    Attributes:
        length: positions, 1 to 8192.
        regex, json_schema, choice: what the hole's text has to match, as in
            :class:`dllmserve.SamplingParams`; at most one of them.
        name: the hole's name in results.
        fill: "exact": all positions are text; an end id among them is a token like any other.
            "up_to": the first end id that is written ends the hole's text, so it may be shorter.

    Raises:
        InvalidParameterError: (a ValueError) a field has a wrong type or value.
        UnknownOptionError: (a TypeError) an unknown keyword.

    Example:
        >>> Hole(8, name="colour").fill
        'exact'
    """

    length: int
    regex: str | None = None
    json_schema: Mapping[str, Any] | str | None = None
    choice: Sequence[str] | None = None
    name: str | None = None
    fill: str = "exact"

    def __new__(cls, *args: Any, **kwargs: Any) -> Hole:
        """Refuse unknown keywords with the nearest name, which dataclasses would not do."""
        check_known(cls.__name__, kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        err = InvalidParameterError
        length = check_int(err, "length of a Hole", self.length, 1, MAX_GEN_LENGTH)
        object.__setattr__(self, "length", length)
        for name in ("regex", "name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise err(f"{name} of a Hole must be a text, got {value!r}")
        object.__setattr__(self, "fill", check_choice(err, "fill of a Hole", self.fill, FILLS))
        object.__setattr__(self, "json_schema", normal_schema(self.json_schema))
        object.__setattr__(self, "choice", normal_choice(self.choice))
        if len(self.constraints) > 1:
            names = " and ".join(self.constraints)
            raise err(f"{names} of a Hole exclude each other: its text matches one of them")

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of what the hole's text has to match."""
        names = ("regex", "json_schema", "choice")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def may_end(self) -> bool:
        """Whether an end id ends it."""
        return self.fill == "up_to"


#: holes of a row with their first positions, ascending; they do not overlap
Holes = tuple[tuple[int, Hole], ...]
