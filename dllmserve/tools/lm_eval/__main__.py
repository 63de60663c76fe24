"""lm-eval's own command line, with the model ``dllmserve`` registered.

lm-eval finds no models of other packages by itself, so this is how it learns of this one.
"""

from __future__ import annotations

import sys

from dllmserve._needs import missing
from dllmserve.cores import passive_waiting
from dllmserve.errors import DllmServeError


def main() -> None:
    """Run lm-eval with the arguments of this process."""
    try:
        with passive_waiting():  # it loads torch
            from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit(f"error: {missing('this command', 'lm_eval', 'lm-eval')}")
    import dllmserve.tools.lm_eval.model  # noqa: F401  registers the model

    try:
        cli_evaluate()
    except DllmServeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
