"""``python -m dllmserve``: the command line."""

from dllmserve.cli.main import main

if __name__ == "__main__":
    main()
