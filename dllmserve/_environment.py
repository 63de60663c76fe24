"""Our own variables in the environment: secrets that stay here, and a switch for the machine."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

from dllmserve._checks import true_or_false
from dllmserve.errors import ConfigError

KEYS_VARIABLE = "DLLMSERVE_API_KEYS"
#: API keys of a server, and the one of a client
SECRETS = (KEYS_VARIABLE, "DLLMSERVE_API_KEY")
#: false forbids the code of checkpoints on a machine, whatever a caller says; true changes nothing
#: for Python, and is the option of that name for ``dllmserve serve``
CODE_VARIABLE = "DLLMSERVE_TRUST_REMOTE_CODE"


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


def refuse_torchrun(why: str) -> None:
    """Raise if this process is one of several ranks that torchrun, or its like, has started.

    Args:
        why: what would start the same processes once for each of them.

    Raises:
        ConfigError: it is.
    """
    ranks = os.environ.get("WORLD_SIZE", "")
    if "RANK" in os.environ and ranks.isdigit() and int(ranks) > 1:
        raise ConfigError(
            f"this is rank {os.environ['RANK']} of {ranks} (RANK and WORLD_SIZE are set): {why}; "
            "start the program without torchrun"
        )


def remote_code_forbidden(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the machine's owner forbids the code of checkpoints.

    Raises:
        ConfigError: the variable is neither true nor false.
    """
    text = (os.environ if environment is None else environment).get(CODE_VARIABLE)
    return text is not None and not true_or_false(ConfigError, CODE_VARIABLE, text)
