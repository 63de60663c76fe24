"""Entry point of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from dllmserve.cli import INTERRUPTED


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: arguments without the program's name; None reads ``sys.argv``.

    Example:
        >>> main(["--version"])
        dllmserve 0.1.0
        0
    """
    try:
        # here and not above, so that Ctrl-C during the imports is no traceback either
        from dllmserve.cli.app import run
        from dllmserve.cores import passive_waiting

        with passive_waiting():
            return run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
