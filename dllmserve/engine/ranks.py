"""Several ranks: rank 0 starts the others, and they do what it does, as its messages say."""

from __future__ import annotations

from dataclasses import asdict

import torch

from dllmserve.config import EngineConfig
from dllmserve.engine.machine import rank_threads
from dllmserve.engine.setup import EnginePlan, build_runner, plan_engine
from dllmserve.errors import DllmServeError, RankError
from dllmserve.parallel.torch_group import TorchGroup
from dllmserve.process.channel import Channel
from dllmserve.process.lead import LeadRunner
from dllmserve.process.messages import Admit, Execute, Join, Reached, Stop, decode_to_worker, encode
from dllmserve.process.ranks import EXCHANGE_S, Ranks, open_store
from dllmserve.runtime.platform import on_device
from dllmserve.runtime.runner import ModelRunner, StepRunner


def lead(plan: EnginePlan) -> tuple[StepRunner, EnginePlan]:
    """Start the other ranks; returns rank 0's runner, and its plan as measured.

    Raises:
        RankError: another rank failed.
        Exception: whatever else is wrong.
    """
    options = plan.sizing.options
    size = options.tensor_parallel_size
    # what was chosen here is what all have: they must do the same things in the same order
    chosen = {"attention": plan.attention, "kernels": plan.kernels}
    threads = plan.threads or max(torch.get_num_threads() // size, 1)
    ranks = Ranks(size, asdict(options) | chosen, threads=threads)
    try:
        ranks.wait_for("started")
        group = ranks.group(plan.device)
        loaded = build_runner(plan, group, lambda: ranks.wait_for("loaded"))
    except BaseException as error:
        # a rank that is gone may be the reason, and rank 0 may notice before it hears of it
        foreign = isinstance(error, RuntimeError) and not isinstance(error, DllmServeError)
        if foreign:
            ranks.explain(error)
        failure = ranks.failure
        ranks.give_up(error)
        ranks.stop()
        if failure is None or isinstance(error, RankError) or not isinstance(error, Exception):
            raise
        raise failure from error
    return LeadRunner(loaded.runner, ranks), loaded.plan


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
