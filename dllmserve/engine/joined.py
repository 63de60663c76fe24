"""JoinedRank: a rank other than 0 in a program that torchrun runs once for each rank."""

from __future__ import annotations

import json
import logging
import os
import threading
from queue import SimpleQueue
from typing import Any

from dllmserve._forks import refuse_fork
from dllmserve.config import EngineConfig
from dllmserve.engine.follower import follow, load_follower
from dllmserve.errors import DllmServeError, RankError, error_named
from dllmserve.ranks.signs import Signs
from dllmserve.ranks.torchrun import World, meet_lead

_log = logging.getLogger("dllmserve.ranks")


class JoinedRank:
    """Follows rank 0 in a thread, and has what calls returned there.

    Args:
        options: as in all ranks.
        world: this process among the others.

    Raises:
        Exception: the model cannot be loaded, as on rank 0.
    """

    def __init__(self, options: EngineConfig, world: World) -> None:
        self._returned: SimpleQueue[str | None] = SimpleQueue()
        self._pid = os.getpid()
        connection, store = meet_lead(world)
        signs = Signs(connection, lambda: None)
        follower = load_follower(
            options, world.rank, store, connection, signs, returned=self._returned.put
        )

        def run() -> None:
            try:
                follow(follower, signs)
            except Exception:
                _log.exception("rank %d failed", world.rank)
            finally:
                self._returned.put(None)

        # the interpreter waits for it at its end, so a program whose other ranks have nothing
        # left to do stays until rank 0 is through
        threading.Thread(target=run, name="dllmserve-follower").start()

    def returned(self) -> list[dict[str, Any]]:
        """What the next call of generate() or chat() returned on rank 0.

        Raises:
            DllmServeError: what it raised there.
            RankError: rank 0 is gone.
            EngineError: this process was forked from the one that follows.
        """
        refuse_fork("LLM", self._pid)
        text = self._returned.get()
        if text is None:
            self._returned.put(None)
            raise RankError("rank 0 is gone")
        found = json.loads(text)
        if isinstance(found, dict):
            raise error_named(found["error"], found["message"])
        answers: list[dict[str, Any]] = found
        return answers


def returned_text(answers: list[dict[str, Any]] | DllmServeError) -> str:
    """The text that :meth:`JoinedRank.returned` reads."""
    if isinstance(answers, DllmServeError):
        return json.dumps({"error": type(answers).__name__, "message": str(answers)})
    return json.dumps(answers)
