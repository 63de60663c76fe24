"""RequestValidator: every check that a request can fail before it is queued. No torch, no weights.

The engine and the processes that talk to it hold requests against the same checks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from dllmserve.catalog import CACHES
from dllmserve.core.canvas import answer_canvas
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.core.rows import written_last
from dllmserve.errors import ContextLengthError, InvalidParameterError, PromptError
from dllmserve.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestValidator:
    """The checks of one engine.

    Attributes:
        spec: the model.
        limits: the engine's sizes.
        has_tokenizer: whether answers have a text.
    """

    spec: ModelSpec
    limits: Limits
    has_tokenizer: bool

    def request(
        self,
        id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        watch: bool = False,
        stream: bool = False,
        owner: str = "",
        name: str = "prompt",
    ) -> Request:
        """A checked request.

        Args:
            id, seed, watch, stream, owner: the request's.
            prompt_ids: token ids; integers of any kind.
            params: how it is decoded.
            name: of the prompt, in errors.

        Raises:
            PromptError, ContextLengthError, InvalidParameterError, CapacityError.
        """
        if not prompt_ids:
            raise PromptError(f"{name} is empty: give at least one token")
        if len(prompt_ids) >= self.limits.max_model_len:
            # before anything looks at every token
            self._check_length(len(prompt_ids), params, name)
        ids = _checked_prompt(prompt_ids, self.spec, name)
        self._check_length(len(ids), params, name)
        self._check(params)
        request = Request(
            id=id,
            canvas=answer_canvas(ids, params.gen_length, params.resolved_block_length),
            params=params,
            seed=seed,
            watch=watch,
            stream=stream,
            owner=owner,
        )
        policy = CACHES[request.policy].load()()
        if reasons := policy.unsupported(self.spec):
            raise InvalidParameterError(f"cache {request.policy!r}: {'; '.join(reasons)}")
        self.limits.check(request, policy.slots(request, self.spec))
        return request

    def _check_length(self, tokens: int, params: SamplingParams, name: str) -> None:
        limit = self.limits.max_model_len
        total = tokens + params.gen_length
        if total > limit:
            raise ContextLengthError(
                f"{name} has {tokens} tokens and {params.length_name} is {params.gen_length}: "
                f"{total} together, over max_model_len={limit}"
            )

    def _check_ends(self, params: SamplingParams) -> None:
        """Refuse what the model has no ids for: it would change nothing."""
        if params.logits_eos_inf and not self.spec.text_end_ids:
            raise InvalidParameterError(
                "logits_eos_inf=True needs a model with an id that ends the text, and this one "
                "has none: leave it out"
            )
        if params.confidence_eos_eot_inf and not written_last(params, self.spec):
            what = "text or a turn" if params.temperature == 0 else "turn"
            why = "" if params.temperature == 0 else f" at temperature={params.temperature:g}"
            raise InvalidParameterError(
                f"confidence_eos_eot_inf=True needs a model with an id that ends a {what}{why}, "
                "and this one has none: leave it out"
            )

    def _check(self, params: SamplingParams) -> None:
        self._check_ends(params)
        if params.stop_strings and not self.has_tokenizer:
            raise InvalidParameterError("stop needs a tokenizer, and this checkpoint has none")
        if params.logit_bias and max(params.logit_bias) >= self.spec.vocab_size:
            raise InvalidParameterError(
                f"logit_bias has token id {max(params.logit_bias)}, outside the vocabulary "
                f"0..{self.spec.vocab_size - 1}"
            )


def _checked_prompt(ids: Sequence[int], spec: ModelSpec, name: str) -> list[int]:
    """The prompt as plain ints (numpy integers are welcome), or an error that says where."""
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < spec.vocab_size:
        return list(ids)  # nearly always; what follows takes ten times as long
    checked = []
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise PromptError(f"{name}[{index}] must be an integer token id, got {token!r}")
        if not 0 <= token < spec.vocab_size:
            raise PromptError(
                f"{name}[{index}] is {token}, outside the vocabulary 0..{spec.vocab_size - 1}"
            )
        checked.append(operator.index(token))
    return checked
