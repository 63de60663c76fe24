"""What a command returns to the shell. Imports nothing, so Ctrl-C at the start finds it loaded."""

from __future__ import annotations

FAILED = 1
INTERRUPTED = 130
