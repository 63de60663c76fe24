"""``dllmserve`` with the engine of chaos.faulty_engine in place of its own."""

from __future__ import annotations

import sys

from dllmserve.process import worker


def main() -> None:
    """Run the command line."""
    # before the supervisor is imported, which takes it over as a default
    worker.COMMAND = (sys.executable, "-m", "chaos.faulty_engine")
    from dllmserve.cli.main import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
