"""A rank that does what rank 0 does, as its messages say."""

from __future__ import annotations

import torch

from dllmserve.config import EngineConfig
from dllmserve.engine.setup import build_runner, plan_engine
from dllmserve.engine.threads import rank_threads
from dllmserve.parallel.torch_group import TorchGroup
from dllmserve.process.channel import Channel
from dllmserve.process.messages import Admit, Execute, Join, Reached, Stop, decode_to_worker, encode
from dllmserve.process.ranks import EXCHANGE_S, open_store
from dllmserve.runtime.platform import on_device
from dllmserve.runtime.runner import ModelRunner


def load_rank(join: Join, channel: Channel) -> ModelRunner:
    """Load a rank's part of the model, together with the others.

    Raises:
        Exception: whatever is wrong.
    """
    options = EngineConfig(**join.options)  # type: ignore[arg-type]
    store = open_store(join.port, join.size)
    plan = plan_engine(options, join.rank)
    threads = rank_threads(options, plan.device, own=True)
    if threads is not None:
        torch.set_num_threads(threads)  # for good: this process is the rank's
    channel.send(encode(Reached("started")))
    group = TorchGroup(store, join.rank, join.size, plan.device, EXCHANGE_S)
    group.connect()
    return build_runner(plan, group, lambda: channel.send(encode(Reached("loaded")))).runner


def follow(runner: ModelRunner, channel: Channel) -> None:
    """Do what rank 0 does until it says stop.

    Raises:
        ChannelClosed: it is gone.
        Exception: what went wrong in a step.
    """
    device = runner.table.device
    with on_device(device):
        while True:
            for data in channel.receive(None):
                message = decode_to_worker(data)
                if isinstance(message, Execute):
                    runner.follow(message.plan)
                elif isinstance(message, Admit):
                    runner.admit(message.row)
                elif isinstance(message, Stop):
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # rank 0 may wait for these steps
                    return
