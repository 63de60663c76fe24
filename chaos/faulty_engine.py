"""An engine process that fails when it runs certain prompts; a server of ours is given it.

Started by chaos.faulty_server as ``python -m chaos.faulty_engine DESCRIPTOR OWNER``. A prompt that
begins with the token POISON fails in the way that its second token stands for.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import torch

from dllmserve.core.plan import StepPlan
from dllmserve.engine import worker
from dllmserve.process.channel import Channel
from dllmserve.runtime.runner import ModelRunner, StepHandle

POISON = 7
#: names of the faults; a prompt's second token is a place in this list
FAULTS = (
    *("exception", "segfault", "abort", "exit", "kill", "hang", "freeze", "garbage"),
    "out of memory",
)

_channels: list[Channel] = []


def fail(how: str) -> None:
    """Fail in that way."""
    if how == "exception":
        raise RuntimeError("a fault on purpose")
    if how == "out of memory":
        raise torch.OutOfMemoryError("out of memory on purpose")
    if how == "hang":
        time.sleep(600)
    if how == "exit":
        os._exit(0)
    if how == "garbage":
        _channels[0].send(b"\xc1 is no msgpack")
        time.sleep(600)
    # "kill" is what the kernel does when memory runs out
    number = {"segfault": "SEGV", "abort": "ABRT", "kill": "KILL", "freeze": "STOP"}[how]
    os.kill(os.getpid(), signal.Signals[f"SIG{number}"])


def poison_steps() -> None:
    """Make the steps that run a poisoned prompt fail."""
    execute, connect = ModelRunner.execute, Channel.__init__

    def faulty(self: ModelRunner, plan: StepPlan) -> StepHandle:
        for span in plan.spans:
            prompt = self.table.host[span.row].ids
            if prompt[0] == POISON and len(prompt) == 2:
                fail(FAULTS[prompt[1]])
        return execute(self, plan)

    def remembered(self: Channel, connected: socket.socket) -> None:
        connect(self, connected)
        _channels.append(self)

    ModelRunner.execute = faulty  # type: ignore[method-assign]
    Channel.__init__ = remembered  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_steps()
    sys.exit(worker.main())
