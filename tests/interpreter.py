"""Triton's interpreter without what it does again at every call.

At every call of a kernel, and of every function in it, it looks through all names of
triton.language for those it has to replace. There are a thousand; which they are never changes.
"""

from functools import cache
from inspect import getmembers
from typing import Any


def quicken() -> None:
    """Have it look once at each module and class."""
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def names(owner: Any) -> list[str]:
        return [name for name, member in getmembers(owner) if is_builtin(member)]

    def patch(owner: Any, *more: Any) -> None:
        for name in names(owner):
            member = getattr(owner, name)
            if is_builtin(member):  # not yet replaced
                interpreter._patch_attr(owner, name, member, *more)

    language = interpreter.tl
    for owner in (language, language.core, language.math, language.tensor):
        names(owner)  # before anything is replaced
    interpreter._patch_builtin = patch
