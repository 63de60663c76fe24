"""An engine process with faults, for tests: what its first argument says, by prompt.

A prompt that begins with the token POISON makes the step that runs it fail in that way.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from dllmserve.core.plan import StepPlan
from dllmserve.engine import worker
from dllmserve.runtime.runner import ModelRunner, StepHandle

POISON = 7


def break_steps(how: str) -> None:
    execute = ModelRunner.execute

    def faulty(self: ModelRunner, plan: StepPlan) -> StepHandle:
        prompts = (self.table.host[span.row].ids for span in plan.spans)
        if any(prompt[0] == POISON for prompt in prompts):
            if how == "raise":
                raise RuntimeError("a fault on purpose")
            if how == "hang":
                time.sleep(600)
            if how == "oom":
                raise torch.OutOfMemoryError("out of memory on purpose")
            os.kill(os.getpid(), getattr(signal, how))
        return execute(self, plan)

    ModelRunner.execute = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    break_steps(sys.argv.pop(1))
    sys.exit(worker.main())
