"""Warm-up: what the first requests would have to wait for is done before the engine is ready.

On a GPU a kernel is compiled and loaded when it is first launched, a library chooses its own when
it first sees a size, and a CUDA graph is captured when a step's shape comes back. So made-up
requests are run, in the sizes that traffic will have: one at a time, then twice as many, up to
``max_num_seqs``. Nothing of them stays but that. Compiled kernels are kept by Triton in
``TRITON_CACHE_DIR``, so that a second start compiles none.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore
from dllmserve.errors import CapacityError
from dllmserve.sampling_params import SamplingParams

_log = logging.getLogger("dllmserve.engine")


@dataclass(frozen=True)
class Level:
    """How much is warmed up.

    Attributes:
        seconds: after which no other requests are begun, and those that run are dropped.
        prompts: lengths of prompts, as shares of the longest.
        sampled: requests that run at once for which tokens are drawn as well, None for any number.
    """

    seconds: float
    prompts: tuple[float, ...]
    sampled: int | None


LEVELS = {"quick": Level(20.0, (1 / 8,), 1), "full": Level(120.0, (1 / 8, 1 / 2), None)}
#: longest made-up prompt and answer: sizes of steps depend on them, what is compiled hardly does
_MOST_PROMPT, _ANSWER = 1024, 64


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did.

    Attributes:
        requests, steps, seconds: that it took.
        complete: whether it came to its end before its time was over.
    """

    requests: int
    steps: int
    seconds: float
    complete: bool


def warm_up(engine: EngineCore, name: str, clock: Callable[[], float] = time.monotonic) -> WarmUp:
    """Run made-up requests on an engine that has none.

    Args:
        engine: idle; it is idle again afterwards, and its pages hold nothing.
        name: a key of :data:`LEVELS`.
        clock: of seconds.

    Example:
        >>> from dllmserve.config import EngineConfig
        >>> from dllmserve.engine.start import build_engine
        >>> engine, _ = build_engine(EngineConfig("tiny", max_num_seqs=1))
        >>> warm_up(engine, "quick").requests >= 1
        True
    """
    level, began = LEVELS[name], clock()
    requests = steps = 0
    complete = True
    for batch in _batches(engine, level):
        for request in batch:
            engine.add(request)
        requests += len(batch)
        while engine.has_work and clock() - began < level.seconds:
            for failed in engine.step().failed:
                _log.warning("a request of the warm-up failed: %s", failed.error)
            steps += 1
        if engine.has_work:
            complete = False
            _drop(engine, batch)
            break
    engine.scheduler.storage.pages.forget()  # nobody will ask for made-up beginnings
    found = WarmUp(requests, steps, clock() - began, complete)
    _log.log(
        logging.INFO if complete else logging.WARNING,
        "warm-up (%s): %d requests, %d steps, %.1f s%s",
        *(name, requests, steps, found.seconds),
        "" if complete else ": its time was over before it was through",
    )
    return found


def _drop(engine: EngineCore, batch: list[Request]) -> None:
    """Abort requests, and take in the steps that are in flight."""
    for request in batch:
        engine.abort(request)
    engine.abandon()


def _batches(engine: EngineCore, level: Level) -> Iterator[list[Request]]:
    """Requests that run at once, few of them first."""
    numbers, few = random.Random(0), level.sampled
    for count in _counts(engine.scheduler.limits.max_num_seqs):
        for share in level.prompts:
            for temperature in (0.0, 1.0):
                if temperature and few is not None and count > few:
                    continue
                try:
                    yield [_request(engine, numbers, share, temperature) for _ in range(count)]
                except CapacityError as error:
                    _log.info("the warm-up leaves a made-up request out: %s", error)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 4 and so on, and the most in the end."""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most


def _request(
    engine: EngineCore, numbers: random.Random, share: float, temperature: float
) -> Request:
    """A made-up request, as long as fits."""
    spec, longest = engine.spec, engine.scheduler.limits.max_model_len
    block = spec.block_length if spec.geometry == "block" else 1
    answer = max(min(_ANSWER, longest // 2) // block, 1) * block
    prompt = max(min(int(longest * share), _MOST_PROMPT, longest - answer) // block * block, 1)
    if prompt + answer > longest:  # of a model with few positions
        prompt, answer = 1, longest - 1
    params = SamplingParams(gen_length=answer, temperature=temperature, seed=0, ignore_eos=True)
    ids = [numbers.randrange(spec.vocab_size) for _ in range(prompt)]
    ids = [(token + 1) % spec.vocab_size if token == spec.mask_id else token for token in ids]
    return engine.make_request(ids, params, name="a made-up prompt")
