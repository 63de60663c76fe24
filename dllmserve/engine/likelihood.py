"""Questions about how likely answers are, from what callers give to forwards and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dllmserve._checks import check_int
from dllmserve._values import MAX_GEN_LENGTH
from dllmserve.core.canvas import Canvas
from dllmserve.core.likelihood import Forward, Likelihoods
from dllmserve.core.validator import RequestValidator
from dllmserve.engine.tokenizer import Tokenizer, prompt_ids
from dllmserve.errors import InvalidParameterError, InvalidRequestError, PromptError
from dllmserve.sampling_params import SamplingParams

if TYPE_CHECKING:  # LLM has no use for it
    from dllmserve.process.calls import Call

#: forwards that are worked out at a time: their tokens take memory
_BATCH = 4096


@dataclass(frozen=True)
class Answer:
    """A checked pair of a prompt and an answer to it, with the canvas that such an answer has."""

    prompt: list[int]
    ids: list[int]
    canvas: Canvas


def read_pairs(
    tokenizer: Tokenizer | None, prompts: Any, answers: Any
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and answers, each a text or ids.

    A prompt has the ids that it has in generate(). An answer that is a text, behind a text, has
    those that follow when both are encoded as one text, if that begins with the prompt's; else its
    own.

    Raises:
        InvalidRequestError, PromptError, TokenizerError.
    """
    for name, given in (("prompts", prompts), ("answers", answers)):
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise PromptError(
                f"{name} must be a list of texts or of token-id lists, got {type(given).__name__}"
            )
    if len(prompts) != len(answers):
        raise InvalidRequestError(
            f"answers has {len(answers)} entries for {len(prompts)} prompts: give one for each, "
            "and a prompt once for each of its answers"
        )
    pairs = []
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = prompt_ids(tokenizer, prompt, f"prompts[{place}]")
        ids = prompt_ids(tokenizer, answer, f"answers[{place}]")
        if isinstance(answer, str) and tokenizer is not None:
            ids = tokenizer.encode(answer, special=False)
            whole = tokenizer.encode(prompt + answer) if isinstance(prompt, str) else []
            if whole[: len(before)] == before:
                ids = whole[len(before) :]
        pairs.append((before, ids))
    return pairs


def checked(
    validator: RequestValidator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Answer]:
    """Pairs that the engine can run.

    Raises:
        PromptError: a prompt or an answer is empty, or has ids outside the vocabulary.
        InvalidRequestError: an answer is too long, or the model bounds no likelihood.
        ContextLengthError, CapacityError: they do not fit.
    """
    if validator.spec.causal_context:
        raise InvalidRequestError(
            "log_likelihood masks some tokens of a block and gives the others, and this model "
            "fills a block as a whole, from its first position on: use a model with full "
            "attention, a block-causal one that sees its blocks, or an autoregressive one"
        )
    found = []
    for place, (prompt, answer) in enumerate(pairs):
        name = f"answers[{place}]"
        if len(answer) > MAX_GEN_LENGTH:
            raise InvalidRequestError(
                f"{name} has {len(answer)} tokens, over {MAX_GEN_LENGTH}: shorten it"
            )
        ids = validator.given(answer, name)
        params = scoring_params(len(ids))
        request = validator.request(0, prompt, params, name=f"prompts[{place}]")
        found.append(Answer(request.prompt_ids, ids, request.canvas))
    return found


def scoring_params(length: int) -> SamplingParams:
    """Parameters with which a forward writes all holes of a canvas of so many at once."""
    return SamplingParams(temperature=0.0, gen_length=length, steps_per_block=1, ignore_eos=True)


def batches(
    validator: RequestValidator,
    tokenizer: Tokenizer | None,
    prompts: Any,
    answers: Any,
    samples: Any,
    seed: Any,
) -> Iterator[Likelihoods]:
    """Answers, some at a time, with the forwards that they take; all are checked before.

    Args:
        validator: of the engine.
        tokenizer: of texts.
        prompts, answers, samples, seed: as somebody gave them.

    Raises:
        InvalidRequestError, CapacityError, TokenizerError: they cannot be run.
    """
    samples = check_int(InvalidParameterError, "samples", samples, 1)
    seed = check_int(InvalidParameterError, "seed", seed, 0, 2**63 - 1)
    return _batches(checked(validator, read_pairs(tokenizer, prompts, answers)), samples, seed)


def _batches(answers: Sequence[Answer], samples: int, seed: int) -> Iterator[Likelihoods]:
    batch = Likelihoods(samples, seed)
    for answer in answers:
        batch.add(answer.prompt, answer.ids, answer.canvas)
        if len(batch.forwards) >= _BATCH:
            yield batch
            batch = Likelihoods(samples, seed)
    yield batch


async def totals(
    found: Iterator[Likelihoods], begin: Callable[[Forward], Call], end: Callable[[Call], None]
) -> list[float]:
    """The answers' sums, by engines in other processes.

    Args:
        found: of :func:`batches`, which are worked out beside the event loop.
        begin, end: submit a forward, and drop it if it has not ended.
    """
    sums = list[float]()
    while (batch := await asyncio.to_thread(next, found, None)) is not None:
        calls: list[Call] = []
        try:
            calls.extend(map(begin, batch.forwards))
            outputs = [await call.output() for call in calls]
        finally:
            for call in calls:
                end(call)
        sums += batch.totals([output.candidate_logprobs or [] for output in outputs])
    return sums
