"""What parts of the package need from the system, and how to get it."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires

from dllmserve._system import SYSTEMS


def install(extra: str) -> str:
    """The command that installs what an extra names.

    It names the packages themselves: so it works for a clone, a wheel and any other way in which
    this package may have come here.

    Example:
        >>> install("bench")
        "pip install 'matplotlib>=3.8' 'aiohttp>=3.11'"
    """
    try:
        lines = requires("dllmserve") or []
    except PackageNotFoundError:  # run from a clone, without having been installed
        lines = []
    mine, packages = re.compile(rf"""(\s+and\s+)?\bextra == ['"]{extra}['"]"""), list[str]()
    for package, _, marker in (line.partition(";") for line in lines):
        if mine.search(marker):
            other = mine.sub("", marker).strip().strip("()").replace("'", '"')
            packages.append(f"'{package.strip()}; {other}'" if other else f"'{package.strip()}'")
    return " ".join(["pip install", *(packages or [f"-e '.[{extra}]'"])])


def missing(what: str, module: str, extra: str) -> str:
    """The error that says why something cannot be done without a module.

    Args:
        what: what needs it.
        module: that is not there.
        extra: of this package, which brings it.
    """
    name = module.partition(".")[0]
    if name.removeprefix("_") in {n.removeprefix("_") for n in sys.stdlib_module_names}:
        return (
            f"{what} needs Python's module {name}, which this system ({platform.system()}) or this "
            f"Python does not have: it runs on {SYSTEMS}"
        )
    return f"{what} needs {name}, which the extra {extra!r} brings: {install(extra)}"
