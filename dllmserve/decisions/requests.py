"""From readings to requests of an engine, and back from their outputs.

A reading is one forward. With full attention its canvas is a row with holes, which are all filled
at once. Otherwise it is a prompt whose answer is one token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence

from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.core.validator import window_of
from dllmserve.decisions.answers import Cost
from dllmserve.decisions.questions import Question
from dllmserve.decisions.reading import MAX_READINGS, Found, How, decide
from dllmserve.decisions.template import Reading, Template
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import InvalidRequestError, TokenizerError
from dllmserve.holes import Hole
from dllmserve.outputs import RequestOutput
from dllmserve.sampling_params import SamplingParams

#: makes a checked request of ids and parameters, and by name of ``holes`` and ``candidates``
Make = Callable[..., Request]
#: probabilities of each question's options, and what they cost
Decided = tuple[list[list[float]], Cost]
#: gives readings to run next, and is sent their outputs
Waves = Generator[list[Reading], list[RequestOutput], Decided]


class Decider:
    """What one engine needs to decide.

    Args:
        tokenizer: the checkpoint's, or None.
        spec: the model.
        limits: the engine's sizes.

    Raises:
        TokenizerError: there is no tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, spec: ModelSpec, limits: Limits) -> None:
        if tokenizer is None:
            raise TokenizerError("decisions need a tokenizer, and this checkpoint has none")
        if spec.noise:
            raise InvalidRequestError(
                "decisions are read where nothing is written yet, and this model has no masks, but "
                "a canvas of noise: use a model with masks, or an autoregressive one"
            )
        self._together = spec.geometry == "full"
        self._spec = spec
        ends = (*spec.turn_end_ids, *spec.eos_ids)
        self._template = Template(tokenizer, ends[0] if ends else None, _room(spec, limits))

    def run(
        self,
        input: str,
        questions: Sequence[Question],
        how: How,
        *,
        at_once: int = MAX_READINGS,
    ) -> Waves:
        """Readings to run next, which are sent their outputs.

        Args:
            input: what is asked about.
            questions: at least one.
            how: how they are read.
            at_once: most readings to be given at a time.

        Returns:
            Probabilities of each question's options, and what they cost.

        Raises:
            ContextLengthError, InvalidParameterError, TokenizerError, PromptError: see
                :func:`dllmserve.decisions.reading.decide`.
        """
        steps = decide(self._template, input, questions, how, together=self._together)
        found: Found | None = None
        cost = Cost()
        while True:
            try:
                readings = next(steps) if found is None else steps.send(found)
            except StopIteration as stop:
                chances: list[list[float]] = stop.value
                return chances, cost
            outputs: list[RequestOutput] = []
            for some in self._waves(readings, at_once):
                outputs += yield some
            pairs = list(zip(readings, outputs, strict=True))
            found = [_logs(*pair) for pair in pairs]
            cost = sum((_cost(*pair) for pair in pairs), cost)

    @staticmethod
    def advance(waves: Waves, outputs: list[RequestOutput] | None) -> list[Reading] | Decided:
        """The next readings of :meth:`run`, or what it returns; ``outputs`` is None at first."""
        try:
            return next(waves) if outputs is None else waves.send(outputs)
        except StopIteration as stop:
            decided: Decided = stop.value
            return decided

    async def answer(
        self,
        input: str,
        questions: Sequence[Question],
        how: How,
        make: Make,
        outputs: Callable[[list[Request]], Awaitable[list[RequestOutput]]],
        *,
        at_once: int = MAX_READINGS,
    ) -> Decided:
        """:meth:`run` from an event loop.

        Args:
            input, questions, how, at_once: as there.
            make: makes checked requests.
            outputs: runs requests to the end.
        """
        waves = self.run(input, questions, how, at_once=at_once)
        found: list[RequestOutput] | None = None
        while True:
            # prompts are put together and tokenised in there, which may take long
            readings = await asyncio.to_thread(self.advance, waves, found)
            if not isinstance(readings, list):
                return readings
            requests = []
            for reading in readings:
                requests.append(self.request(reading, make))
                await asyncio.sleep(0)  # other tasks run between them
            found = await outputs(requests)

    def request(self, reading: Reading, make: Make) -> Request:
        """A checked request for one forward, from a function that checks them.

        Raises:
            InvalidRequestError, CapacityError: it could never run on this engine.
        """
        if self._together:
            holes = tuple((position, Hole(1)) for position in reading.holes)
            # one block, whatever length the engine's options give to those of others
            block = len(reading.ids) if self._spec.block_length else None
            params = SamplingParams(
                temperature=0.0, steps_per_block=1, block_length=block, ignore_eos=True
            )
            return make(reading.ids, params, holes=holes, candidates=reading.asked)
        params = SamplingParams(temperature=0.0, gen_length=1, steps_per_block=1, ignore_eos=True)
        prompt = reading.ids[:-1]
        # a block is filled to its end, of which nothing is read
        behind = -len(reading.ids) % (window_of(self._spec, params) or 1)
        return make(prompt, params, candidates=(*reading.asked, *[()] * behind))

    def _waves(self, readings: list[Reading], most: int) -> Iterator[list[Reading]]:
        """Groups of readings; a prompt that they share has to be stored by the first of them."""
        start = 0 if self._together or len(readings) == 1 else 1
        if start:
            yield readings[:1]
        for low in range(start, len(readings), most):
            yield readings[low : low + most]


def _room(spec: ModelSpec, limits: Limits) -> int:
    """Most positions of a canvas: a forward of full attention computes all of it."""
    if spec.geometry == "full":
        longest = MAX_GEN_LENGTH if spec.block_length else limits.max_model_len
        return min(longest, limits.max_model_len, limits.max_num_batched_tokens)
    room = min(limits.max_model_len, limits.num_pages * limits.page_size)
    block = spec.block_length or 1
    return room // block * block


def _logs(reading: Reading, output: RequestOutput) -> list[list[float]]:
    return (output.candidate_logprobs or [])[: len(reading.holes)]


def _cost(reading: Reading, output: RequestOutput) -> Cost:
    read = sum(bool(asked) for asked in reading.asked)
    return Cost(output.prompt_tokens, output.cached_tokens, read, output.forward_passes)
