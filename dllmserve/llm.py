"""LLM: load a model and generate, in the caller's own thread."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm import asyncio as text_bars
from tqdm.auto import tqdm

from dllmserve._system import refuse_torchrun
from dllmserve._values import SparseConfig
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore
from dllmserve.engine.filled import Template, template_row
from dllmserve.engine.setup import EnginePlan
from dllmserve.engine.shared import SharedEngine
from dllmserve.engine.start import build_engine
from dllmserve.engine.tokenizer import Tokenizer, prompt_ids
from dllmserve.errors import (
    ConfigError,
    InvalidParameterError,
    InvalidRequestError,
    PromptError,
    TokenizerError,
)
from dllmserve.holes import Holes
from dllmserve.models.loader import EMBEDDED
from dllmserve.outputs import CanvasStep
from dllmserve.sampling_params import SamplingParams, with_sparse

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
            forward_passes, cached_tokens) and ``steps``, for each of token_ids the number, from 1,
            of the forward that wrote it; with ``logprobs`` in the parameters ``logprobs``, see
            :class:`dllmserve.outputs.TokenLogprob`; with history ``history``, see
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
        params = _params(sampling_params, sparse_configs, len(prompts))
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
            ``holes``, a list of ``{"name", "text", "token_ids"}``, and ``finish_reason`` ("stop"
            if all holes that may end early did) and ``usage`` as of :meth:`generate`.

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
        params = _params(sampling_params, None, len(templates), prompts="templates")
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
    ) -> list[dict[str, Any]]:
        """Answer one conversation, or several, with the checkpoint's chat template.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists. What else
                a message may have is in :func:`dllmserve.messages.template_messages`.
            sampling_params, sparse_configs, use_tqdm: as in :meth:`generate`.

        Returns:
            As :meth:`generate`, one dictionary per conversation.

        Raises:
            TokenizerError: the checkpoint has no chat template.
            PromptError: a conversation is none.
        """
        from dllmserve.messages import conversations

        self._shared.check()
        read = conversations(messages)
        params = _params(sampling_params, sparse_configs, len(read))
        ids = [self._chat_ids(conversation) for conversation in read]
        return self._run(ids, params, use_tqdm)

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
        (params,) = _params(sampling_params, sparse_config, 1, "sparse_config")
        ids = prompt_ids(self._tokenizer, prompt, "prompt")
        request = self._engine.make_request(ids, params, watch=True)
        return _canvases(self._shared, request)

    def chat_ids(self, messages: Messages) -> list[int]:
        """Prompt ids of a conversation, rendered with the chat template.

        Raises:
            TokenizerError: no tokenizer or chat template, or it refuses the messages.
            PromptError: this is no conversation, see :mod:`dllmserve.messages`.
        """
        from dllmserve.messages import template_messages

        self._shared.check()
        return self._chat_ids(template_messages(messages))

    def _chat_ids(self, conversation: list[dict[str, Any]]) -> list[int]:
        if self._tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer, so chat() cannot be used")
        return self._tokenizer.chat_ids(conversation)

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
        core, engine = self._engine, self._shared
        jobs = zip(prompts, params, holes or [()] * len(prompts), strict=True)
        batch = engine.submit(
            [
                core.make_request(ids, own, holes=gaps, trace=trace, name=f"{name}[{place}]")
                for place, (ids, own, gaps) in enumerate(jobs)
            ]
        )
        shown = use_tqdm and bool(prompts)
        began, steps, committed = time.monotonic(), engine.steps, engine.committed
        try:
            with _progress_bar(len(prompts), shown) as bar:
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
            return [ticket.output.as_dict() for ticket in batch.tickets if ticket.output]
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


def _progress_bar(total: int, shown: bool) -> Any:
    """A bar on standard error, or in a notebook."""
    in_file = tqdm is text_bars.tqdm and not (sys.stderr and sys.stderr.isatty())
    return tqdm(
        total=total,
        desc="Generating",
        disable=not shown,
        mininterval=_FILE_S if in_file else _SCREEN_S,
        miniters=0,  # forwards and tokens move while no request ends
    )


def _params(
    sampling: Any,
    sparse: Any,
    count: int,
    name: str = "sparse_configs",
    prompts: str = "prompts",
) -> list[SamplingParams]:
    """Parameters of each prompt, with the SparseConfig that was given beside them."""
    params = _one_each("sampling_params", sampling, SamplingParams, count, prompts=prompts)
    configs = _one_each(name, sparse, SparseConfig, count, optional=True)
    pairs = list(zip(params, configs, strict=True))
    # mostly all are one and the same, and are checked once
    different = {(id(p), id(s)): (p, s) for p, s in pairs}
    made = {key: with_sparse(*pair) for key, pair in different.items()}
    return [made[id(p), id(s)] for p, s in pairs]


def _one_each(
    name: str,
    given: Any,
    kind: type[Any],
    count: int,
    *,
    optional: bool = False,
    prompts: str = "prompts",
) -> list[Any]:
    """One value per prompt, from a single value or a list of the right length."""
    if given is None or isinstance(given, kind):
        default = None if optional else kind()
        return [given if given is not None else default] * count
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise InvalidParameterError(
            f"{name} must be a {kind.__name__} or a list of them, got {type(given).__name__}"
        )
    if len(given) != count:
        raise InvalidRequestError(f"{name} has {len(given)} entries for {count} {prompts}")
    for place, item in enumerate(given):
        if not isinstance(item, kind) and not (optional and item is None):
            raise InvalidParameterError(
                f"{name}[{place}] must be a {kind.__name__}, got {type(item).__name__}"
            )
    return list(given)
