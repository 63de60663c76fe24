"""build_engine: a whole engine, on one device or on several."""

from __future__ import annotations

from dataclasses import replace

from dllmserve.catalog import CACHES, Made
from dllmserve.config import EngineConfig
from dllmserve.core.scheduler import Scheduler
from dllmserve.engine.core import EngineCore
from dllmserve.engine.machine import mind_the_parent, rank_threads, with_threads
from dllmserve.engine.setup import EnginePlan, build_runner, plan_engine
from dllmserve.models.loader import find_model, require_weights
from dllmserve.parallel.group import SOLO
from dllmserve.runtime.runner import StepRunner


def build_engine(options: EngineConfig) -> tuple[EngineCore, EnginePlan]:
    """Load the model and set up an engine; with several ranks, this process's is rank 0.

    Raises:
        ModelError, ConfigError, OutOfMemoryError: see :func:`plan_engine` and the loader.
        RankError: another rank failed.
        EngineError: this process was forked from one that has used CUDA.
    """
    mind_the_parent(options)
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
            from dllmserve.engine.ranks import lead  # an engine on one device needs none of it

            runner, plan = lead(plan)
        engine = engine_of(runner, plan)
    if options.warmup != "none":
        from dllmserve.engine.warmup import warm_up

        warm_up(engine, options.warmup)
    return engine, plan


def engine_of(runner: StepRunner, plan: EnginePlan) -> EngineCore:
    """The engine that steps with a runner."""
    options = plan.sizing.options
    scheduler = Scheduler(plan.spec, plan.limits, Made(CACHES).__getitem__)
    depth = options.steps_per_sync if plan.device.type == "cuda" else 1
    return EngineCore(scheduler, runner, plan.tokenizer, options.seed, depth, plan.threads)
