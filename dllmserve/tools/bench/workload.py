"""What a benchmark asks of the engine: seeded random prompts, decoded one way."""

from __future__ import annotations

import random
from dataclasses import dataclass

from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError, ContextLengthError
from dllmserve.knobs import check_knobs, knob
from dllmserve.sampling_params import SamplingParams

#: a derived max_model_len is rounded up to this, so that small changes keep the engine's sizes
LENGTH_STEP = 256


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One way of decoding, and how often it is measured; the knobs say what the fields are.

    Attributes:
        params: of every request.
        seed: of the prompts.

    Raises:
        ConfigError: a number is too small.
    """

    prompt_len: int = knob(256, "Tokens of each prompt.", low=1)
    params: SamplingParams
    seed: int = 0
    runs: int = knob(3, "Timed runs; medians are reported.", low=1)
    warmup: int = knob(1, "Runs that are not timed, before the others.", low=0)

    def __post_init__(self) -> None:
        check_knobs(ConfigError, self)

    @property
    def canvas_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.prompt_len + self.params.gen_length

    @property
    def rows_per_request(self) -> int:
        """Rows of the state table that a request takes."""
        return 2 if self.params.cfg_scale > 0 else 1

    def max_model_len(self, spec: ModelSpec) -> int:
        """The smallest engine that holds the workload, rounded up to LENGTH_STEP.

        Raises:
            ContextLengthError: the model has too few positions.
        """
        if self.canvas_len > spec.max_model_len:
            raise ContextLengthError(
                f"prompt_len={self.prompt_len} and gen_length={self.params.gen_length} are "
                f"{self.canvas_len} tokens together, over the model's {spec.max_model_len}"
            )
        return min(-(-self.canvas_len // LENGTH_STEP) * LENGTH_STEP, spec.max_model_len)

    def prompts(self, count: int, spec: ModelSpec) -> list[list[int]]:
        """Random prompts, the same for the same seed; fewer are the first of more."""
        ids, draw = prompt_vocabulary(spec), random.Random(self.seed)
        return [draw.choices(ids, k=self.prompt_len) for _ in range(count)]


def prompt_vocabulary(spec: ModelSpec) -> list[int]:
    """Ids that random prompts are made of."""
    # mask and end ids would be legal, but no text has them inside a prompt
    barred = {spec.mask_id, *spec.eos_ids}
    return [token for token in range(spec.vocab_size) if token not in barred]
