"""LLM: load a model and generate, in the caller's own thread."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request
from dllmserve.engine.core import EngineCore
from dllmserve.engine.joined import JoinedRank, returned_text
from dllmserve.engine.setup import EnginePlan, plan_engine
from dllmserve.engine.start import build_engine
from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer
from dllmserve.errors import (
    ConfigError,
    DllmServeError,
    EngineError,
    InvalidParameterError,
    InvalidRequestError,
    PromptError,
    TokenizerError,
)
from dllmserve.messages import template_messages
from dllmserve.models.loader import EMBEDDED
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.ranks import torchrun
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]
Messages = Sequence[Mapping[str, Any]]

#: canvases kept for a stream that is read slower than the engine runs; older ones are lost
_KEPT_CANVASES = 256


class LLM:
    """A diffusion language model, loaded and ready to generate.

    Args:
        model: local directory, hub id, or "tiny" (also the default) for the model that
            ships with the package.
        enforce_eager: never use CUDA graphs.
        tensor_parallel_size: devices to spread the model over. The other ranks are processes
            that end with :meth:`close`, or with this one. Under torchrun the program runs once
            for each rank; generate() and chat() then return the same in all of them.
        max_model_len: longest prompt + answer in tokens; None takes it from config.json.
        trust_remote_code: let a tokenizer that nothing else can load run its own code.
        **engine_options: any field of :class:`dllmserve.config.EngineConfig`.

    Raises:
        UnknownOptionError: (a TypeError) an unknown option, with the nearest name.
        ConfigError: (a ValueError) a bad option value.
        ModelError: the model cannot be found or loaded; see :mod:`dllmserve.errors`.
        OutOfMemoryError: it does not fit the device.

    Example:
        >>> from dllmserve import LLM, SamplingParams
        >>> llm = LLM("tiny")
        >>> params = SamplingParams(temperature=0.0, gen_length=8, steps=8)
        >>> sorted(llm.generate(["Hello"], params, use_tqdm=False)[0])
        ['finish_reason', 'text', 'token_ids', 'usage']
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
        self._joined: JoinedRank | None = None
        self._announces = False
        world = torchrun.world() if self.config.tensor_parallel_size > 1 else None
        if world is not None:
            torchrun.check_world(world, self.config.tensor_parallel_size)
            self._announces = world.rank == 0
        if world is not None and world.rank > 0:
            self._plan = plan_engine(self.config, world.rank)
            self._joined = JoinedRank(self.config, world)
            return
        self._core, self._plan = build_engine(self.config)
        self._close = weakref.finalize(self, self._core.close)
        # one thread steps the engine at a time; a step serves the requests of all threads
        self._lock = threading.RLock()
        self._live: dict[int, Request] = {}
        self._outputs: dict[int, RequestOutput] = {}
        self._canvases: dict[int, deque[CanvasStep]] = {}
        # a stream that is closed by garbage collection may end in the middle of a step
        self._dropped: deque[Request] = deque()
        self._stepping = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of other ranks. Without any, there is nothing that needs it."""
        if self._joined is None:
            with self._lock:
                self._close()

    @property
    def _engine(self) -> EngineCore:
        if self._joined is not None:
            raise EngineError(
                "this rank follows rank 0: only generate() and chat() can be called on all ranks"
            )
        if not self._close.alive:
            raise EngineError("the engine has been closed")
        return self._core

    def _on_all_ranks(self, call: Callable[[], list[RequestOutput]]) -> list[dict[str, Any]]:
        """Run a call on rank 0; its result is that of all ranks."""
        if self._joined is not None:
            return self._joined.returned()
        if not self._announces:
            return [output.as_dict() for output in call()]
        try:
            answers = [output.as_dict() for output in call()]
        except BaseException as error:
            # whatever it is: the others wait to hear of it
            told = error if isinstance(error, DllmServeError) else EngineError(repr(error))
            self._engine.announce(returned_text(told))
            raise
        self._engine.announce(returned_text(answers))
        return answers

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
        """The checkpoint's tokenizer, or None."""
        if self._joined is not None:
            trusted = self.config.trust_remote_code
            return load_tokenizer(self._plan.directory, trust_remote_code=trusted)
        return self._engine.tokenizer

    @contextmanager
    def observe(self, callback: Callable[[StepPlan], None]) -> Iterator[None]:
        """Call ``callback`` with the plan of every step launched inside the ``with`` block.

        Plans tell what was computed (:class:`dllmserve.core.plan.StepPlan`), for
        benchmarks and debugging; the callback must be quick.
        """
        self._engine.observers.append(callback)
        try:
            yield
        finally:
            self._engine.observers.remove(callback)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sparse_configs: SparseConfig | Sequence[SparseConfig | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Complete prompts, many at a time.

        Args:
            prompts: texts or token-id lists.
            sampling_params: one for all prompts or one per prompt.
            sparse_configs: None (dense), one for all prompts or one per prompt.
            use_tqdm: show a progress bar.

        Returns:
            One dictionary per prompt, in the order of the prompts: ``text``, ``token_ids``,
            ``finish_reason`` ("stop" or "length") and ``usage`` (prompt_tokens,
            completion_tokens, forward_passes).

        Raises:
            InvalidRequestError, CapacityError, TokenizerError: one bad request raises
                before any of them runs.
            OutOfMemoryError: the device ran out of memory.
        """
        return self._on_all_ranks(
            lambda: self._generate(prompts, sampling_params, sparse_configs, use_tqdm)
        )

    def _generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        sparse_configs: SparseConfig | Sequence[SparseConfig | None] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise PromptError(
                "prompts must be a list of texts or of token-id lists, "
                f"got {type(prompts).__name__}"
            )
        count = len(prompts)
        params = _one_each("sampling_params", sampling_params, SamplingParams, count)
        sparse = _one_each("sparse_configs", sparse_configs, SparseConfig, count, optional=True)
        ids = [self._prompt_ids(p, f"prompts[{i}]") for i, p in enumerate(prompts)]
        return self._run(ids, params, sparse, use_tqdm)

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
        return self._on_all_ranks(
            lambda: self._chat(messages, sampling_params, sparse_configs, use_tqdm)
        )

    def _chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        sparse_configs: SparseConfig | Sequence[SparseConfig | None] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        conversations = _conversations(messages)
        count = len(conversations)
        params = _one_each("sampling_params", sampling_params, SamplingParams, count)
        sparse = _one_each("sparse_configs", sparse_configs, SparseConfig, count, optional=True)
        ids = [self.chat_ids(c) for c in conversations]
        return self._run(ids, params, sparse, use_tqdm)

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
        params = _one_each("sampling_params", sampling_params, SamplingParams, 1)[0]
        sparse = _one_each("sparse_config", sparse_config, SparseConfig, 1, optional=True)[0]
        ids = self._prompt_ids(prompt, "prompt")
        (request,) = self._submit([ids], [params], [sparse], watch=True)
        canvases = self._canvases[request.id]
        try:
            while self._advance(request) or canvases:
                while canvases:
                    yield canvases.popleft()
        finally:
            self._drop([request])

    def chat_ids(self, messages: Messages) -> list[int]:
        """Prompt ids of a conversation, rendered with the chat template.

        Raises:
            TokenizerError: no tokenizer or chat template, or it refuses the messages.
            PromptError: this is no conversation, see :mod:`dllmserve.messages`.
        """
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer, so chat() cannot be used")
        # the template writes the special tokens itself
        return tokenizer.encode(tokenizer.render_chat(template_messages(messages)), special=False)

    def _prompt_ids(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise TokenizerError(
                    f"{name} is a text, but the checkpoint has no tokenizer: give token ids"
                )
            return self._engine.tokenizer.encode(prompt)
        if hasattr(prompt, "tolist"):  # a numpy array or a tensor
            prompt = prompt.tolist()
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            return list(prompt)
        raise PromptError(
            f"{name} must be a text or a list of token ids, got {type(prompt).__name__}"
        )

    def _run(
        self,
        prompts: list[list[int]],
        params: list[Any],
        sparse: list[Any],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Check all requests, then run them to the end."""
        requests = self._submit(prompts, params, sparse)
        bar = tqdm(total=len(requests), desc="Generating", disable=not use_tqdm or not requests)
        try:
            done = 0
            for request in requests:
                while self._advance(request):
                    now = sum(r.id in self._outputs for r in requests)
                    bar.update(now - done)
                    done = now
            bar.update(len(requests) - done)
            return [self._outputs[r.id] for r in requests]
        finally:
            # after an error or Ctrl-C nothing of this call stays behind
            self._drop(requests)
            bar.close()

    def _submit(
        self,
        prompts: list[list[int]],
        params: list[Any],
        sparse: list[Any],
        *,
        watch: bool = False,
    ) -> list[Request]:
        """Check all requests before any of them is queued."""
        with self._lock:
            requests = [
                self._engine.make_request(
                    ids,
                    params[i],
                    sparse[i],
                    watch=watch,
                    name="prompt" if watch else f"prompts[{i}]",
                )
                for i, ids in enumerate(prompts)
            ]
            for request in requests:
                self._engine.add(request)
                self._live[request.id] = request
                if watch:
                    self._canvases[request.id] = deque(maxlen=_KEPT_CANVASES)
        return requests

    def _advance(self, request: Request) -> bool:
        """Run a step for everybody unless the request has ended; say whether it still runs.

        Raises:
            Exception: whatever ended the request, in this thread's step or in another's.
        """
        with self._lock:
            if request.id in self._outputs:
                return False
            if request.error is not None:
                raise request.error
            self._free_dropped()
            self._stepping = True
            try:
                events = self._engine.step()
            except BaseException as error:
                # the step was cut short, so no request's state can be trusted any more
                self._engine.abandon()
                for other in self._live.values():
                    other.error = EngineError(f"the engine's step failed: {error!r}")
                    other.error.__cause__ = error
                for other in self._live.values():
                    self._engine.abort(other)
                raise
            finally:
                self._stepping = False
            for ended, output in events.finished:
                self._outputs[ended.id] = output
            for watched, canvas in events.watched:
                if watched.id in self._canvases:
                    self._canvases[watched.id].append(canvas)
            return True

    def _drop(self, requests: list[Request]) -> None:
        """Forget requests, and free what those that still run hold, between two steps."""
        self._dropped.extend(requests)
        with self._lock:
            if not self._stepping:
                self._free_dropped()

    def _free_dropped(self) -> None:
        while self._dropped:
            request = self._dropped.popleft()
            self._engine.abort(request)
            self._live.pop(request.id, None)
            self._outputs.pop(request.id, None)
            self._canvases.pop(request.id, None)


def _one_each(
    name: str, given: Any, kind: type[Any], count: int, *, optional: bool = False
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
        raise InvalidRequestError(f"{name} has {len(given)} entries for {count} prompts")
    for place, item in enumerate(given):
        if not isinstance(item, kind) and not (optional and item is None):
            raise InvalidParameterError(
                f"{name}[{place}] must be a {kind.__name__}, got {type(item).__name__}"
            )
    return list(given)


def _conversations(messages: Any) -> list[Messages]:
    """One conversation or several, checked, as chat templates read them."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        return []
    if isinstance(messages[0], Mapping):
        return [template_messages(messages)]
    return [template_messages(m, f"conversation {place}") for place, m in enumerate(messages)]
