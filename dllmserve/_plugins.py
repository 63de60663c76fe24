"""What other packages add to the catalogue by entry points."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from dllmserve.errors import ConfigError

_Kind = TypeVar("_Kind")


def added(what: str, group: str, own: Collection[str]) -> dict[str, EntryPoint]:
    """The entry points of a group, by name.

    Args:
        what: the kind of their entries, for people.
        group: of the entry points.
        own: names that are taken.

    Raises:
        ConfigError: one has a name that is taken.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        if point.name in own or point.name in found:
            raise ConfigError(
                f"{_whose(point)} adds the {what} {point.name!r}, and there is one of that name "
                "already: uninstall the package, or rename what it adds"
            )
        found[point.name] = point
    return found


def load(what: str, point: EntryPoint, kind: type[_Kind]) -> _Kind:
    """The entry that an entry point leads to.

    Raises:
        ConfigError: it leads to something else, or cannot be imported.
    """
    where = f"the {what} {point.name!r} of {_whose(point)}"
    try:
        found = point.load()
    except Exception as error:  # a package of others may raise anything
        raise ConfigError(f"{where} cannot be loaded ({point.value}): {error}") from error
    if not isinstance(found, kind):
        raise ConfigError(
            f"{where} must be a dllmserve.catalog.{kind.__name__}, and {point.value} is {found!r}"
        )
    return found


def _whose(point: EntryPoint) -> str:
    return f"package {point.dist.name!r}" if point.dist is not None else "a package"
