"""Follower: a rank that does what rank 0 does, as its messages say.

    python -m dllmserve.engine.follower DESCRIPTOR OWNER

It lives as long as its owner: it ends when rank 0 closes the connection, and on Linux the
kernel kills it when rank 0 dies, even in the middle of a step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

from dllmserve.config import EngineConfig
from dllmserve.engine.setup import build_runner, plan_engine
from dllmserve.engine.threads import rank_threads
from dllmserve.parallel.group import TorchGroup
from dllmserve.ranks.daemon import prepare_process
from dllmserve.ranks.ranks import EXCHANGE_S
from dllmserve.ranks.signs import LOADED, STARTED, Signs, leave_at_once
from dllmserve.ranks.spawn import open_store
from dllmserve.ranks.wire import Kind, decode_plan, decode_row, read
from dllmserve.runtime.platform import first_line, on_device
from dllmserve.runtime.runner import ModelRunner

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Follower:
    """A loaded rank.

    Args:
        runner: this rank's.
        connection: to rank 0.
        returned: called with what calls returned on rank 0.
    """

    def __init__(
        self,
        runner: ModelRunner,
        connection: Connection,
        returned: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._runner, self._connection, self._returned = runner, connection, returned

    def run(self) -> None:
        """Follow rank 0 until it says stop. Raises EOFError if it is gone."""
        device = self._runner.table.device
        with on_device(device):
            while True:
                kind, numbers, text = read(self._connection.recv_bytes())
                if kind is Kind.STOP:
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # rank 0 may wait for these steps
                    return
                if kind is Kind.PLAN:
                    self._runner.follow(decode_plan(numbers))
                elif kind is Kind.ROW:
                    self._runner.admit(decode_row(numbers))
                else:
                    self._returned(text)


def load_follower(
    options: EngineConfig,
    rank: int,
    store: Store,
    connection: Connection,
    signs: Signs,
    *,
    returned: Callable[[str], None] = lambda text: None,
) -> Follower:
    """Load a rank's part of the model.

    Raises:
        Exception: whatever is wrong; rank 0 has been told.
    """
    try:
        plan = plan_engine(options, rank)
        threads = rank_threads(options, plan.device, own=True)
        if threads is not None:
            torch.set_num_threads(threads)  # for good: this process is the rank's
        signs.reached(STARTED)
        group = TorchGroup(store, rank, options.tensor_parallel_size, plan.device, EXCHANGE_S)
        group.connect()
        loaded = build_runner(plan, group, lambda: signs.reached(LOADED))
    except Exception as error:
        signs.failed(f"{type(error).__name__}: {first_line(error)}")
        raise
    return Follower(loaded.runner, connection, returned)


def follow(follower: Follower, signs: Signs) -> None:
    """Run until rank 0 ends it, or is gone.

    Raises:
        Exception: what went wrong in a step; rank 0 has been told.
    """
    try:
        follower.run()
    except EOFError:
        return
    except Exception as error:
        signs.failed(f"{type(error).__name__}: {first_line(error)}")
        raise
    finally:
        signs.stop()


def main() -> int:
    """Entry point: the connection's descriptor and the owner's process id are the arguments."""
    descriptor, owner = map(int, sys.argv[1:3])
    prepare_process(owner)
    connection = Connection(descriptor)
    signs = Signs(connection, leave_at_once)
    setup = json.loads(connection.recv_bytes())
    options = EngineConfig(**setup["options"])
    store = open_store(setup["port"], setup["size"])
    follower = load_follower(options, setup["rank"], store, connection, signs)
    follow(follower, signs)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    leave_at_once() if code == 0 else sys.exit(code)
