"""Knobs: one line for each field of a dataclass of options, from which everything else comes.

The line has the default, the bounds, the help text and what reads the value. From it come the
checks, the options of the command line, the fields of HTTP bodies, and the columns in which rules
find their numbers on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from dllmserve._checks import ErrorType, check_bool, check_choice, check_float, check_int

#: what a text may be: a fixed list, or one that other packages may add to
Choices = Collection[str] | Callable[[], Collection[str]]


@dataclass(frozen=True, kw_only=True)
class Knob:
    """What is known of a field.

    Attributes:
        help: a sentence for the command line and for bodies.
        low, high: bounds of a number; None for none.
        low_open: the lower bound itself is too low.
        choices: of a text.
        column: rules find the number under the field's name, as a float64.
        most_asked: largest number that a body may have, where code may give a larger one.
        own_check: the class checks the field in a way of its own.
        panel: headline on the command line, where it is not the group's.
    """

    help: str
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    choices: Choices | None = None
    column: bool = False
    most_asked: float | None = None
    own_check: bool = False
    panel: str = ""

    def values(self) -> Collection[str]:
        """What a text may be; nothing for other fields."""
        found = self.choices
        return () if found is None else found() if callable(found) else found


def knob(default: Any, help: str, *, compare: bool = True, repr: bool = True, **traits: Any) -> Any:
    """A field of a dataclass; the traits are those of :class:`Knob`.

    Example:
        >>> @dataclass
        ... class Options:
        ...     share: float = knob(0.5, "How much is kept.", low=0, high=1)
        >>> knobs(Options)["share"].high
        1
    """
    metadata = {"knob": Knob(help=help, **traits)}
    return field(default=default, compare=compare, repr=repr, metadata=metadata)


def knobs(kind: type[Any]) -> Mapping[str, Knob]:
    """The knobs of a dataclass, by name, in the order of its fields."""
    return {f.name: f.metadata["knob"] for f in fields(kind) if "knob" in f.metadata}


def columns(kind: type[Any]) -> tuple[str, ...]:
    """Names of the numbers that rules read, in the order that they have on the device."""
    return tuple(name for name, it in knobs(kind).items() if it.column)


def types(kind: type[Any]) -> Mapping[str, tuple[type[Any], bool]]:
    """The plain type of each field, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        options = get_args(hint) or (hint,)
        plain = next(t for t in options if t is not NoneType)
        found[name] = (plain, NoneType in options)
    return found


def check_knobs(err: ErrorType, owner: Any, *names: str) -> None:
    """Check fields of a dataclass; plain values stay in them.

    Args:
        err: what a wrong value raises.
        owner: the object, in its ``__post_init__``.
        names: of the fields; by default all that have no check of their own.
    """
    kind = type(owner)
    if kind not in _CHECKED:
        hints = types(kind)
        _CHECKED[kind] = {n: (*hints[n], it) for n, it in knobs(kind).items()}
    found = _CHECKED[kind]
    for name in names or found:
        plain, optional, it = found[name]
        value = getattr(owner, name)
        if (it.own_check and not names) or (optional and value is None):
            continue
        if plain is bool:
            value = check_bool(err, name, value)
        elif plain is int:
            high = None if it.high is None else int(it.high)
            value = check_int(err, name, value, int(it.low or 0), high)
        elif plain is float:
            value = check_float(err, name, value, it.low, it.high, low_open=it.low_open)
        elif it.choices is not None:
            value = check_choice(err, name, value, it.values())
        object.__setattr__(owner, name, value)


#: by class and name, what is checked: :func:`types`, knob. To find it takes longer than to check
_CHECKED: dict[type[Any], dict[str, tuple[type[Any], bool, Knob]]] = {}
