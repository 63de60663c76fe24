"""Our own variables in the environment: secrets, which stay here."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

KEYS_VARIABLE = "DLLMSERVE_API_KEYS"
#: API keys of a server, and the one of a client
SECRETS = (KEYS_VARIABLE, "DLLMSERVE_API_KEY")


def child_environment(*changes: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that we start: ours, without our secrets.

    Args:
        changes: variables that it gets besides; the last one counts.
    """
    found = {name: value for name, value in os.environ.items() if name not in SECRETS}
    for more in changes:
        found.update(more)
    return found


def forget_secrets() -> None:
    """Take our secrets out of this process's environment, once they have been read.

    The system shows the environment that a process was started with to every process of the
    same user, so on Linux the values there are overwritten.
    """
    for name in SECRETS:
        if name in os.environ and sys.platform == "linux":
            libc = ctypes.CDLL(None)
            libc.getenv.restype = ctypes.c_void_p
            value = libc.getenv(os.fsencode(name))
            if value:
                ctypes.memset(value, 0, len(ctypes.string_at(value)))
        os.environ.pop(name, None)
