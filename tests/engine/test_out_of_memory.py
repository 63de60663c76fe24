"""A step that runs out of memory behind the model is run again, from the same rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import StepPlan
from dllmserve.decoding.stats import TokenStats
from dllmserve.runtime.logits import LogitsHead
from dllmserve.runtime.runner import ModelRunner, StepHandle
from tests.conftest import Engines
from tests.helpers import check_idle, need_interpreter, random_prompt

NO_MEMORY = "CUDA out of memory. Tried to allocate 2 MiB."
BASE: dict[str, Any] = {"temperature": 0.0, "gen_length": 8, "block_length": 4}
#: what a step writes for them: tokens, ends, twins, what rules keep, what is out of date
PARAMS = [
    SamplingParams(steps=4, ignore_eos=True, **BASE),
    SamplingParams(unmask="threshold", threshold=0.2, early_end=True, **BASE),
    SamplingParams(unmask="wino", threshold=0.1, threshold_back=0.3, **BASE),
    SamplingParams(unmask="klass", threshold=0.1, kl_threshold=0.5, cache="delayed", **BASE),
    SamplingParams(unmask="credit", threshold=0.2, early_end=True, cache="dual", **BASE),
    SamplingParams(unmask="factor", cfg_scale=0.5, cache="delayed", **BASE),
    SamplingParams(unmask="threshold", threshold=0.2, cfg_scale=0.5, early_end=True, **BASE),
    SamplingParams(unmask="factor", cache="drift", refresh_every=2, **BASE),
    SamplingParams(steps=6, cache="rolling", ignore_eos=True, **BASE),
    SamplingParams(unmask="joint", max_edit_steps=2, cfg_scale=0.5, **BASE),
]
#: those whose steps the kernels take
PLAIN = [PARAMS[0], PARAMS[1], PARAMS[6], PARAMS[-1]]


class Shortage(Protocol):
    """While it is entered, it counts what may allocate; at one of these memory runs out."""

    count: int

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...


class Allocating(TorchDispatchMode):
    """Any of torch's operations.

    May allocate what returns new memory, and writing by several indices, which on a GPU are copied
    to be laid out alike.
    """

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.failing, self.count = failing, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is torch.ops.aten.index_put_.default and len(args[1]) > 1:
            self.allocates()
        found = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        if any(x.untyped_storage().data_ptr() not in held for x in made):
            self.allocates()
        return found

    def allocates(self) -> None:
        self.count += 1
        if self.count == self.failing:
            raise torch.OutOfMemoryError(NO_MEMORY)


class Scarce:
    """torch.empty, as a module of kernels sees it; the interpreter uses torch for itself, too."""

    def __init__(self, module: ModuleType, failing: int) -> None:
        self.module: Any = module
        self.failing, self.count = failing, 0

    def __enter__(self) -> None:
        self.module.torch = self

    def __exit__(self, *error: Any) -> None:
        self.module.torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        if self.count == self.failing:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return torch.empty(*args, **kwargs)


def run(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    params: list[SamplingParams],
    step: int,
    shortage: Shortage,
) -> list[dict[str, Any]]:
    """Answers where memory is short behind the LM head of one step."""
    execute, stats = ModelRunner.execute, LogitsHead.stats
    steps, entered = 0, False

    def executing(runner: ModelRunner, plan: StepPlan) -> StepHandle:
        nonlocal steps, entered
        steps += 1
        try:
            return execute(runner, plan)
        finally:
            if entered:
                shortage.__exit__(None, None, None)
                entered = False

    def then_short(head: LogitsHead, *args: Any, **kwargs: Any) -> TokenStats:
        nonlocal entered
        found = stats(head, *args, **kwargs)
        if steps == step:
            shortage.__enter__()
            entered = True
        return found

    prompts = [random_prompt(place, 1 + place) for place in range(len(params))]
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "execute", executing)
        patch.setattr(LogitsHead, "stats", then_short)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    check_idle(llm)
    assert steps > step
    return outputs


def check(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    params: list[SamplingParams],
    step: int,
    short: Callable[[int], Shortage],
) -> int:
    """No token, forward or end comes out otherwise, whichever allocation fails; how many may."""
    none = short(0)
    expected = run(llm, monkeypatch, params, step, none)
    for failing in range(1, none.count + 1):
        assert run(llm, monkeypatch, params, step, short(failing)) == expected, failing
    return none.count


@pytest.mark.parametrize("step", [2])
def test_torch(
    engines: Engines, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    llm = engines(checkpoints["llada-eos"])
    assert check(llm, monkeypatch, PARAMS, step, Allocating) > 100


def test_triton(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    need_interpreter()
    from dllmserve.runtime.kernels import finish

    options: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 8}
    llm = LLM(str(checkpoints["llada-eos"]), device="cpu", kernels="triton", **options)
    params = [replace(one, gen_length=3, block_length=3, steps=2) for one in PLAIN]
    assert check(llm, monkeypatch, params, 1, partial(Scarce, finish)) > 5
