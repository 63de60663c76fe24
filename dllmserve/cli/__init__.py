"""Command line: ``dllmserve generate`` and the other commands."""

#: what a command returns to the shell; here, so that Ctrl-C at the start finds them loaded
FAILED = 1
INTERRUPTED = 130
