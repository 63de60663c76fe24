"""Command line: ``dllmserve generate`` and ``dllmserve info``."""
