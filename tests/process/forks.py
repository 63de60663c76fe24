"""Work in a forked child."""

import os
import signal
import threading
import warnings
from collections.abc import Callable

PATIENCE_S = 60.0


def forked(work: Callable[[], object]) -> str:
    """What a forked child says of some work. One that hangs is killed, and fails the test."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # newer Pythons warn of forks beside threads, which is what these tests are about
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        said = ""
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    killer = threading.Timer(PATIENCE_S, lambda: os.kill(pid, signal.SIGKILL))
    killer.start()
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    killer.cancel()
    assert os.waitpid(pid, 0)[1] == 0, "it hangs"
    return told
