"""``python -m dllmserve``: the command line."""

import sys

from dllmserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
