"""Warm-up: made-up requests in the sizes of traffic, of which nothing stays."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.config import EngineConfig
from dllmserve.core.plan import StepPlan
from dllmserve.engine import warmup
from dllmserve.engine.core import EngineCore
from dllmserve.engine.start import build_engine
from dllmserve.engine.warmup import LEVELS, warm_up
from dllmserve.errors import ConfigError
from tests.helpers import GOLDEN, check_idle, random_prompt

#: full attention, with a shift and without; blocks; one token after the other; canvases of noise
MODELS = ("llada-kv2of4", "dream-kv2of4", "sdar-kv2of4", "qwen3-kv2of4", "diffusion-gemma-e6")


def engine(name: str, **options: Any) -> EngineCore:
    given = {"max_num_seqs": 3, "max_model_len": 64, "seed": 5, **options}
    return build_engine(EngineConfig(str(GOLDEN / name), **given))[0]


def watched(core: EngineCore) -> list[StepPlan]:
    plans: list[StepPlan] = []
    core.observers.append(plans.append)
    return plans


@pytest.mark.parametrize(
    ("name", "level"), [*((name, "quick") for name in MODELS), ("sdar-kv2of4", "full")]
)
def test_every_number_of_requests_twice_as_large(name: str, level: str) -> None:
    core = engine(name)
    plans = watched(core)
    found = warm_up(core, level, clock=lambda: 0.0)
    assert found.complete and found.steps > 0
    together = [len(plan.entries) for plan in plans]
    assert set(together) == {1, 2, 3}
    assert together[0] == 1
    each = {"quick": 1 + 2 + 3 + 1, "full": 4 * (1 + 2 + 3)}
    assert found.requests == each[level]
    assert not core.has_work
    assert not core.step().finished
    pages = core.scheduler.storage.pages
    assert pages.num_free == core.scheduler.limits.num_pages


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_it_stays(name: str) -> None:
    """Answers, and seeds of requests without one, are those of an engine that had none."""
    options: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 64, "seed": 5}
    plain = LLM(str(GOLDEN / name), **options)
    warm = LLM(str(GOLDEN / name), warmup="quick", **options)
    check_idle(warm)
    params = [SamplingParams(gen_length=8, temperature=t) for t in (0.0, 1.0, 1.0)]
    prompts = [random_prompt(n, 9) for n in range(3)]
    expected = plain.generate(prompts, params, use_tqdm=False)
    assert warm.generate(prompts, params, use_tqdm=False) == expected


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes on by a step each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * step


def test_when_its_time_is_over() -> None:
    """What runs is dropped, and the engine is as good as new."""
    for seconds in (0, 3, 17):
        core = engine("sdar-kv2of4")
        found = warm_up(core, "quick", clock=ticking(LEVELS["quick"].seconds / (seconds + 1)))
        assert not found.complete
        assert not core.has_work
        assert core.scheduler.storage.pages.num_free == core.scheduler.limits.num_pages
        request = core.make_request(random_prompt(1, 5), SamplingParams(gen_length=8))
        core.add(request)
        while core.has_work:
            core.step()
        assert request.finish_reason


def test_without_room_for_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dllmserve.engine"):
        core = engine("qwen3-kv2of4", kv_pages=1, page_size=8)
        found = warm_up(core, "full")
    assert found.requests == 0 and found.complete
    assert "leaves a made-up request out" in caplog.text


@pytest.mark.parametrize("longest", [2, 3, 9, 40])
def test_models_of_few_positions(longest: int) -> None:
    for name in ("llada-kv2of4", "qwen3-kv2of4"):
        assert warm_up(engine(name, max_model_len=longest), "full").requests > 0


def test_the_engine_is_ready_afterwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []
    real = warm_up
    monkeypatch.setattr(
        warmup, "warm_up", lambda core, name: called.append(name) or real(core, name)
    )
    with caplog.at_level("INFO", "dllmserve.engine"):
        LLM("tiny", warmup="quick", max_num_seqs=1, max_model_len=64)
        LLM("tiny", max_num_seqs=1, max_model_len=64)
    assert called == ["quick"]
    assert "warm-up (quick): 2 requests" in caplog.text


def test_levels_have_names() -> None:
    with pytest.raises(ConfigError, match="warmup must be one of"):
        EngineConfig(warmup="some")
