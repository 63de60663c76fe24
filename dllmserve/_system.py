"""Where no engine runs: on Windows, in a forked process, or as one of the ranks of torchrun."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from dllmserve.errors import ConfigError, EngineError

SYSTEMS = "Linux or macOS (on Windows: in WSL or a container)"


@dataclass
class Inherited:
    """What this process has of a parent that it was forked from, without being able to use it.

    Attributes:
        threads: torch was there, and may have had threads; a fork has only the one that forked.
        cuda: torch had a CUDA context.
    """

    threads: bool = False
    cuda: bool = False
    _next: tuple[bool, bool] = (False, False)

    def note(self) -> None:
        """Look at torch, in a process that is about to be forked."""
        torch = sys.modules.get("torch")
        cuda = getattr(torch, "cuda", None)  # another thread may just import it
        self._next = (torch is not None, cuda is not None and bool(cuda.is_initialized()))

    def inherit(self) -> None:
        """Called in the child. It keeps the parent's own limits, too."""
        threads, cuda = self._next
        self.threads, self.cuda = self.threads or threads, self.cuda or cuda


def refuse_fork(kind: str, pid: int) -> None:
    """Raise EngineError unless this process is ``pid``, where an object of a kind was started."""
    here = os.getpid()
    if here != pid:
        raise EngineError(
            f"this {kind} was started in process {pid} and works only there; process {here} was "
            f"forked from it: make a new {kind} in this process, or start the process with "
            "multiprocessing's 'spawn' method and make it there"
        )


def refuse_windows() -> None:
    """Raise ConfigError on the system where no engine runs.

    Engines and their ranks are processes that are ended by signals which Windows does not have.
    """
    if sys.platform == "win32":
        raise ConfigError(f"dllmserve runs on {SYSTEMS}")


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


inherited = Inherited()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=inherited.note, after_in_child=inherited.inherit)
