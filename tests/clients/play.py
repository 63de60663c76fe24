"""Plays the scenarios of one client, in whose environment it runs: a line of JSON for each.

``python -m tests.clients.play NAME URL MODEL``; see README.md.
"""

import json
import sys
import time
import traceback
from importlib import import_module, metadata

from tests.clients.scenarios import Target


def main(name: str, url: str, model: str) -> None:
    module = import_module(f"tests.clients.with_{name}")
    version = metadata.version(module.PACKAGE)
    for scenario in module.SCENARIOS:
        began, wrong = time.monotonic(), ""
        try:
            scenario(Target(url, model))
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        row = {"client": module.PACKAGE, "version": version, "scenario": scenario.__name__}
        row |= {"seconds": time.monotonic() - began, "wrong": wrong}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
