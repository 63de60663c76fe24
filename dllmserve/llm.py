"""LLM: load a model and generate, in the caller's own thread."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tqdm import asyncio as text_bars
from tqdm.auto import tqdm

from dllmserve._each import each_params
from dllmserve._system import refuse_torchrun
from dllmserve._values import SparseConfig
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.decoding.noise import CanvasNoise
from dllmserve.engine.core import EngineCore
from dllmserve.engine.filled import Template, template_row
from dllmserve.engine.setup import EnginePlan
from dllmserve.engine.shared import SharedEngine
from dllmserve.engine.start import build_engine
from dllmserve.engine.tokenizer import Tokenizer, prompt_ids
from dllmserve.errors import (
    ConfigError,
    PromptError,
    TokenizerError,
)
from dllmserve.holes import Holes
from dllmserve.models.loader import EMBEDDED
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dllmserve.decisions.requests import Decider

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]
Messages = Sequence[Mapping[str, Any]]

#: seconds between two pictures of the progress bar: on a screen, and in a file, where all stay
_SCREEN_S, _FILE_S = 0.1, 10.0


class LLM:
    """A diffusion language model, loaded and ready to generate.

    Args:
        model: local directory, hub id, or "tiny" (also the default) for the model that
            ships with the package.
        enforce_eager: never use CUDA graphs.
        tensor_parallel_size: devices to spread the model over. The other ranks are processes
            that end with :meth:`close`, or with this one.
        max_model_len: longest prompt + answer in tokens; None takes it from config.json.
        trust_remote_code: let a tokenizer that nothing else can load, having no tokenizer.json
            for one, run the code that the checkpoint ships for it. A warning names the file before.
            Nothing else of a checkpoint is ever run. The environment variable
            DLLMSERVE_TRUST_REMOTE_CODE=0 forbids it for a machine, whatever is given here.
        **engine_options: any field of :class:`dllmserve.config.EngineConfig`.

    Raises:
        UnknownOptionError: (a TypeError) an unknown option, with the nearest name.
        ConfigError: (a ValueError) a bad option value, or torchrun has started this process and
            tensor_parallel_size is over 1.
        ModelError: the model cannot be found or loaded; see :mod:`dllmserve.errors`.
        OutOfMemoryError: it does not fit the device.

    Example:
        >>> from dllmserve import LLM, SamplingParams
        >>> llm = LLM("tiny")
        >>> params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
        >>> sorted(llm.generate(["Hello"], params, use_tqdm=False)[0])
        ['finish_reason', 'steps', 'text', 'token_ids', 'usage']
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = EMBEDDED,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        trust_remote_code: bool = True,
        **engine_options: Any,
    ) -> None:
        named = {
            "model": os.fspath(model) if isinstance(model, os.PathLike) else model,
            "enforce_eager": enforce_eager,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "trust_remote_code": trust_remote_code,
        }
        if "data_parallel_size" in engine_options:
            raise ConfigError(
                "LLM runs one engine; for data_parallel_size use dllmserve.AsyncLLM or "
                "dllmserve serve --data-parallel-size"
            )
        self.config = EngineConfig.from_options("LLM", {**named, **engine_options})
        if self.config.tensor_parallel_size > 1:
            refuse_torchrun("LLM(tensor_parallel_size=N) starts the other ranks itself")
        core, self._plan = build_engine(self.config)
        self._tokenizer = core.tokenizer
        self._shared = SharedEngine(core)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way in any thread with an EngineError, and the ranks' processes.

        A step that runs is waited for. Afterwards every call raises an EngineError. May be called
        again, and from any thread. In a forked process it does nothing: the engine is the parent's.
        """
        self._shared.close()

    @property
    def _engine(self) -> EngineCore:
        """The engine, if it can be used: not closed, nor in a forked process."""
        self._shared.check()
        return self._shared.core

    @property
    def spec(self) -> ModelSpec:
        """Dimensions and special ids of the model."""
        return self._plan.spec

    @property
    def plan(self) -> EnginePlan:
        """Sizes, dtype, device and memory plan of the engine."""
        return self._plan

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None; usable after close() and in forked processes."""
        return self._tokenizer

    def use_noise(self, noise: CanvasNoise) -> None:
        """Take the noise of canvases from elsewhere, of a model that has such.

        With :class:`dllmserve.decoding.noise.RecordedNoise` a request repeats the draws of another
        program, by its seed.

        Raises:
            ConfigError: the model is shared between processes, or it has masks.
        """
        self._engine.use_noise(noise)

    def observe(self, callback: Callable[[StepPlan], None]) -> AbstractContextManager[None]:
        """Call ``callback`` with the plan of every step launched inside the ``with`` block.

        Plans tell what was computed (:class:`dllmserve.core.plan.StepPlan`), for
        benchmarks and debugging; the callback must be quick. It runs inside the step: it may
        close() the engine, but not generate with it, and an error in it ends the requests of the
        step.
        """
        self._shared.check()
        return self._shared.observed(callback)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sparse_configs: SparseConfig | Sequence[SparseConfig | None] | None = None,
        use_tqdm: bool = True,
        history: bool = False,
    ) -> list[dict[str, Any]]:
        """Complete prompts, many at a time.

        Args:
            prompts: texts or token-id lists.
            sampling_params: one for all prompts or one per prompt.
            sparse_configs: None (dense), one for all prompts or one per prompt.
            use_tqdm: show a progress bar.
            history: tell what each forward wrote, too.

        Returns:
            One dictionary per prompt, in the order of the prompts: ``text``, ``token_ids``,
            ``finish_reason`` ("stop" or "length"), ``usage`` (prompt_tokens, completion_tokens,
            forward_passes, cached_tokens, edits) and ``steps``, for each of token_ids the number,
            from 1, of the forward that wrote it; with ``logprobs`` in the parameters ``logprobs``,
            see :class:`dllmserve.outputs.TokenLogprob`; with history ``history``, see
            :class:`dllmserve.outputs.Forward`.

        Raises:
            InvalidRequestError, CapacityError, TokenizerError: one bad request raises
                before any of them runs.
            OutOfMemoryError: the device ran out of memory.
        """
        self._shared.check()  # before tokenizers and torch, which may hang in a forked process
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise PromptError(
                "prompts must be a list of texts or of token-id lists, "
                f"got {type(prompts).__name__}"
            )
        params = each_params(sampling_params, sparse_configs, len(prompts))
        ids = [prompt_ids(self._tokenizer, p, f"prompts[{i}]") for i, p in enumerate(prompts)]
        return self._run(ids, params, use_tqdm, trace=history)

    def infill(
        self,
        templates: Sequence[Template],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Fill the holes of templates, many at a time.

        Args:
            templates: lists of pieces: texts, lists of token ids, and :class:`dllmserve.Hole`.
                A text becomes ids by itself, wherever it stands; only one that begins a template
                gets what the tokenizer puts before a plain prompt.
            sampling_params: one for all templates or one per template. Blocks are windows that
                are cut from the row's start; ``block_length=None`` is one for the whole row.
                ``steps_per_block`` are the forwards of a window; without them, each window gets
                ``steps`` divided by the number of windows, rounded up.
            use_tqdm: show a progress bar.

        Returns:
            One dictionary per template, in their order: ``text`` and ``token_ids`` of the whole,
            ``holes``, a list of ``{"name", "text", "token_ids", "steps"}``, ``finish_reason``
            ("stop" if all holes that may end early did), and what else :meth:`generate` gives.

        Raises:
            InvalidRequestError, CapacityError, TokenizerError: one bad template raises before any
                of them runs.
            OutOfMemoryError: the device ran out of memory.

        Example:
            >>> from dllmserve import LLM, Hole, SamplingParams
            >>> llm, params = LLM("tiny"), SamplingParams(temperature=0.0)
            >>> (filled,) = llm.infill([["Copy: ", Hole(4), " green"]], params, use_tqdm=False)
            >>> len(filled["holes"][0]["token_ids"])
            4
        """
        self._shared.check()
        if isinstance(templates, (str, bytes)) or not isinstance(templates, Sequence):
            raise PromptError(
                "templates must be a list of templates, each a list of pieces, got "
                f"{type(templates).__name__}"
            )
        params = each_params(sampling_params, None, len(templates), prompts="templates")
        rows = [
            template_row(self._tokenizer, template, f"templates[{place}]")
            for place, template in enumerate(templates)
        ]
        ids, holes = [row for row, _ in rows], [found for _, found in rows]
        return self._run(ids, params, use_tqdm, holes=holes, name="templates")

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sparse_configs: SparseConfig | Sequence[SparseConfig | None] | None = None,
        use_tqdm: bool = True,
        continue_final_message: bool = False,
    ) -> list[dict[str, Any]]:
        """Answer one conversation, or several, with the checkpoint's chat template.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists. What else
                a message may have is in :func:`dllmserve.messages.template_messages`.
            sampling_params, sparse_configs, use_tqdm: as in :meth:`generate`.
            continue_final_message: the last message of each conversation is the assistant's, and
                is left open: the answer is what follows its text.

        Returns:
            As :meth:`generate`, one dictionary per conversation.

        Raises:
            TokenizerError: the checkpoint has no chat template.
            PromptError: a conversation is none.
        """
        from dllmserve.messages import conversations

        self._shared.check()
        read = conversations(messages)
        params = each_params(sampling_params, sparse_configs, len(read))
        ids = [self._chat_ids(conversation, continue_final_message) for conversation in read]
        return self._run(ids, params, use_tqdm)

    def log_likelihood(
        self,
        prompts: Prompts,
        answers: Prompts,
        samples: int = 128,
        seed: int = 0,
        use_tqdm: bool = True,
    ) -> list[float]:
        """How likely answers to prompts are: natural logarithms, none above 0 but by chance.

        Of an autoregressive model exact. Of a masked one an estimate of a lower bound (LLaDA's
        ``get_loglikelihood``); exact where an answer has one token. Of a block-causal one the sum
        of the bounds of its blocks. Forwards are ordinary requests: they share steps with others.

        Args:
            prompts: texts or token-id lists, one for each answer; a prompt may come again.
            answers: texts or token-id lists.
            samples: forwards of an estimate, at most; those that mask the same are run once. Those
                of the answers to one prompt mask alike, so that their difference has less noise.
            seed: of what is masked.
            use_tqdm: show a progress bar.

        Returns:
            One number for each answer.

        Raises:
            InvalidRequestError, CapacityError, TokenizerError: before anything runs.
            OutOfMemoryError: the device ran out of memory.

        Example:
            >>> yes, no = llm.log_likelihood(["The people"] * 2, [" of", " xx"])  # doctest: +SKIP
        """
        from dllmserve.engine.likelihood import batches, scoring_params

        self._shared.check()
        asked = self._tokenizer, prompts, answers, samples, seed
        found, totals = batches(self._engine.validator, *asked), list[float]()
        with _progress_bar(len(answers), use_tqdm and bool(answers), "Scoring") as bar:
            for batch in found:
                outputs = self._outputs(
                    [
                        self._engine.make_request(
                            list(forward.canvas.ids),
                            scoring_params(len(forward.named)),
                            candidates=forward.candidates,
                            canvas=forward.canvas,
                        )
                        for forward in batch.forwards
                    ]
                )
                totals += batch.totals([output.candidate_logprobs or [] for output in outputs])
                bar.update(len(totals) - bar.n)
        return totals

    def decide(
        self,
        input: str | Messages,
        questions: Sequence[Mapping[str, Any]],
        model: str | None = None,
        *,
        reading: str = "parallel",
        orders: int = 1,
    ) -> dict[str, Any]:
        """Answer typed questions about an input with probabilities, read off in one forward.

        Args:
            input: a text, or messages, calls of tools and their outputs, in the shapes of OpenAI's
                ``/v1/decisions``.
            questions: 1 to 400 predicates, choices and scores, in those shapes.
            model: what the reply calls the model; by default what the engine's options call it.
            reading: "parallel" (all questions in one forward) or "sequential" (each sees the
                answers to those before it, which takes a forward for each).
            orders: average each question over so many orders of its options, each a forward.

        Returns:
            ``model``, ``answers`` in the order of the questions, and ``usage``.

        Raises:
            DecisionError: the input or a question is wrong; its ``param`` names the place.
            InvalidRequestError, CapacityError, TokenizerError: it cannot be read here.

        Example:
            >>> asked = {"type": "predicate", "instructions": "It rains."}
            >>> answer = LLM("tiny").decide("Take an umbrella.", [asked])["answers"][0]
            >>> 0 <= answer["probability"] <= 1
            True
        """
        from dllmserve.decisions.answers import decision
        from dllmserve.decisions.inputs import read_input
        from dllmserve.decisions.questions import read_questions
        from dllmserve.decisions.reading import How

        self._shared.check()
        read, given, decider = read_questions(questions), read_input(input), self._decider
        waves = decider.run(given, read, How(reading, orders))
        outputs: list[RequestOutput] | None = None
        while isinstance(readings := decider.advance(waves, outputs), list):
            make = self._engine.make_request
            outputs = self._outputs([decider.request(each, make) for each in readings])
        return decision(model or self.config.model, read, *readings)

    @cached_property
    def _decider(self) -> Decider:
        from dllmserve.decisions.requests import Decider

        return Decider(self._tokenizer, self._plan.spec, self._plan.limits)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> Iterator[CanvasStep]:
        """Watch one answer being filled in: an event per forward pass.

        The last event carries the finished output. Leaving the loop early drops the
        request. A reader that pauses while other threads generate may miss events, never
        the last one.
        """
        self._shared.check()  # a forked process hears of it before anything else is done
        (params,) = each_params(sampling_params, sparse_config, 1, "sparse_config")
        ids = prompt_ids(self._tokenizer, prompt, "prompt")
        request = self._engine.make_request(ids, params, watch=True)
        return _canvases(self._shared, request)

    def chat_ids(self, messages: Messages, continue_final_message: bool = False) -> list[int]:
        """Prompt ids of a conversation, rendered with the chat template; see :meth:`chat`.

        Raises:
            TokenizerError: no tokenizer or chat template, or it refuses the messages.
            PromptError: this is no conversation, see :mod:`dllmserve.messages`.
        """
        from dllmserve.messages import template_messages

        self._shared.check()
        return self._chat_ids(template_messages(messages), continue_final_message)

    def _chat_ids(self, conversation: list[dict[str, Any]], goes_on: bool) -> list[int]:
        if self._tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer, so chat() cannot be used")
        return self._tokenizer.chat_ids(conversation, continue_final_message=goes_on)

    def _run(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        use_tqdm: bool,
        *,
        trace: bool = False,
        holes: Sequence[Holes] | None = None,
        name: str = "prompts",
    ) -> list[dict[str, Any]]:
        """Check all requests, then run them to the end."""
        core, gaps = self._engine, holes or [()] * len(prompts)
        requests = [
            core.make_request(ids, own, holes=open_, trace=trace, name=f"{name}[{place}]")
            for place, (ids, own, open_) in enumerate(zip(prompts, params, gaps, strict=True))
        ]
        outputs = self._outputs(requests, use_tqdm and bool(prompts))
        return [output.as_dict() for output in outputs]

    def _outputs(self, requests: list[Request], shown: bool = False) -> list[RequestOutput]:
        """Run checked requests to the end, with a progress bar if it is to be shown."""
        engine = self._shared
        batch = engine.submit(requests)
        began, steps, committed = time.monotonic(), engine.steps, engine.committed
        try:
            with _progress_bar(len(requests), shown) as bar:
                for ticket in batch.tickets:
                    while engine.advance(ticket):
                        if not shown:
                            continue
                        seconds = max(time.monotonic() - began, 1e-3)
                        speed = (engine.committed - committed) / seconds
                        bar.set_postfix_str(
                            f"{engine.steps - steps} forwards, {speed:.0f} tokens/s", refresh=False
                        )
                        bar.update(batch.ended - bar.n)
                bar.update(batch.ended - bar.n)
            return [ticket.output for ticket in batch.tickets if ticket.output]
        finally:
            # after an error or Ctrl-C nothing of this call stays behind
            engine.drop(batch)


def _canvases(engine: SharedEngine, request: Request) -> Iterator[CanvasStep]:
    """Run a request from the moment somebody looks, and give what is seen of it."""
    batch = engine.submit([request])
    (ticket,) = batch.tickets
    try:
        while (canvas := engine.canvas(ticket)) is not None:
            yield canvas
    finally:
        engine.drop(batch)


def _progress_bar(total: int, shown: bool, what: str = "Generating") -> Any:
    """A bar on standard error, or in a notebook."""
    in_file = tqdm is text_bars.tqdm and not (sys.stderr and sys.stderr.isatty())
    return tqdm(
        total=total,
        desc=what,
        disable=not shown,
        mininterval=_FILE_S if in_file else _SCREEN_S,
        miniters=0,  # forwards and tokens move while no request ends
    )
