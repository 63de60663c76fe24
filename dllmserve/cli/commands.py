"""Commands whose help pages do not show ``--help`` as if it took a value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

#: what help pages show for options without a value
_NO_VALUE = " "


class Command(TyperCommand):
    """A command."""

    def get_help_option(self, ctx: Any) -> Any:
        """See :func:`_without_value`."""
        return _without_value(super().get_help_option(ctx))


class CommandGroup(TyperGroup):
    """A command with commands below it."""

    def get_help_option(self, ctx: Any) -> Any:
        """See :func:`_without_value`."""
        return _without_value(super().get_help_option(ctx))


def _without_value(option: Any) -> Any:
    """The option, shown as one that takes no value; typer would call it <bool>."""
    if option is not None:
        option.metavar = _NO_VALUE
    return option
