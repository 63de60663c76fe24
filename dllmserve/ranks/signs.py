"""What the other ranks tell rank 0, and how they do it in the middle of everything else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

#: first byte of a message: alive; a stage is reached; failed. Text follows the last two.
ALIVE, REACHED, FAILED = b"a", b"r", b"f"
#: seconds between two signs of life
PULSE_S = 0.5
#: the stages: torch is there; the weights are loaded
STARTED, LOADED = "started", "loaded"


class Signs:
    """A rank's way to tell rank 0 how it stands.

    A thread gives a sign of life every half second, whatever the rank computes. A process that
    is stopped gives none.

    Args:
        connection: to rank 0.
        orphaned: called when rank 0 is gone.
    """

    def __init__(self, connection: Connection, orphaned: Callable[[], None]) -> None:
        self._connection, self._orphaned = connection, orphaned
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dllmserve-pulse", daemon=True)
        self._thread.start()

    def reached(self, stage: str) -> None:
        """A stage is reached."""
        self._send(REACHED + stage.encode())

    def failed(self, text: str) -> None:
        """This rank can not go on."""
        self._send(FAILED + text.encode())

    def stop(self) -> None:
        """No more signs."""
        self._over.set()

    def _send(self, data: bytes) -> bool:
        try:
            with self._lock:
                self._connection.send_bytes(data)
        except OSError:
            return False
        return True

    def _beat(self) -> None:
        while not self._over.wait(PULSE_S):
            if not self._send(ALIVE):
                self._orphaned()
                return


def leave_at_once() -> None:
    """End the process, even if it waits for a rank that is gone."""
    os._exit(0)
