"""build_engine: a whole engine, on one device or on several."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import torch

from dllmserve._system import inherited
from dllmserve.catalog import CACHES, Made
from dllmserve.config import EngineConfig
from dllmserve.core.scheduler import Scheduler
from dllmserve.engine.core import EngineCore
from dllmserve.engine.setup import EnginePlan, build_runner, plan_engine
from dllmserve.engine.threads import rank_threads, with_threads
from dllmserve.errors import DllmServeError, EngineError, RankError
from dllmserve.models.loader import find_model, require_weights
from dllmserve.parallel.group import SOLO
from dllmserve.runtime.runner import StepRunner

_log = logging.getLogger("dllmserve.engine")


def build_engine(options: EngineConfig) -> tuple[EngineCore, EnginePlan]:
    """Load the model and set up an engine; with several ranks, this process's is rank 0.

    Raises:
        ModelError, ConfigError, OutOfMemoryError: see :func:`plan_engine` and the loader.
        RankError: another rank failed.
        EngineError: this process was forked from one that has used CUDA.
    """
    _mind_the_parent(options)
    if options.load_format != "dummy":
        require_weights(find_model(options.model))  # before its sizes are held against memory
    plan = plan_engine(options)
    plan = replace(plan, threads=rank_threads(options, plan.device))
    with with_threads(plan.threads):
        if options.tensor_parallel_size == 1:
            alone = build_runner(plan, SOLO)
            runner: StepRunner = alone.runner
            plan = alone.plan
        else:
            runner, plan = _lead(plan)
        return engine_of(runner, plan), plan


def _mind_the_parent(options: EngineConfig) -> None:
    """Do without what a forked process cannot use of its parent's, where that is possible."""
    if inherited.cuda and not options.device.startswith("cpu"):
        raise EngineError(
            "CUDA cannot be used in a process that was forked from one that has used it: start "
            "the process with multiprocessing's 'spawn' method, or set device='cpu'"
        )
    if inherited.threads and torch.get_num_threads() > 1:
        _log.warning(
            "this process was forked from one that had loaded torch, whose threads it does not "
            "have: torch computes with one thread here; start the process with multiprocessing's "
            "'spawn' method to use more"
        )
        torch.set_num_threads(1)  # with more, torch waits for ever for those of the parent


def _lead(plan: EnginePlan) -> tuple[StepRunner, EnginePlan]:
    """Start the other ranks; returns rank 0's runner."""
    from dllmserve.process.lead import LeadRunner  # an engine on one device needs none of it
    from dllmserve.process.ranks import Ranks

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


def engine_of(runner: StepRunner, plan: EnginePlan) -> EngineCore:
    """The engine that steps with a runner."""
    options = plan.sizing.options
    scheduler = Scheduler(plan.spec, plan.limits, Made(CACHES).__getitem__)
    depth = options.steps_per_sync if plan.device.type == "cuda" else 1
    return EngineCore(scheduler, runner, plan.tokenizer, options.seed, depth, plan.threads)
