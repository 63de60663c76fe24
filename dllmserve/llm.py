"""LLM: load a model and generate, in the caller's own thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.engine.core import is_live
from dllmserve.engine.setup import EnginePlan, build_engine
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import InvalidParameterError, InvalidRequestError, PromptError, TokenizerError
from dllmserve.models.loader import EMBEDDED
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[str | Sequence[int]]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A diffusion language model, loaded and ready to generate.

    Args:
        model: local directory, hub id, or "tiny" (also the default) for the model that
            ships with the package.
        enforce_eager: never use CUDA graphs.
        tensor_parallel_size: devices to spread the model over.
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
        model: str = EMBEDDED,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        trust_remote_code: bool = True,
        **engine_options: Any,
    ) -> None:
        named = {
            "model": model,
            "enforce_eager": enforce_eager,
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "trust_remote_code": trust_remote_code,
        }
        self.config = EngineConfig.from_options("LLM", {**named, **engine_options})
        self._engine, self._plan = build_engine(self.config)
        # the engine's state has one owner at a time
        self._lock = threading.RLock()

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
        return self._engine.tokenizer

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sparse_configs: SparseConfig | None | Sequence[SparseConfig | None] = None,
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
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts must be a list of texts or of token-id lists, got {type(prompts).__name__}"
            )
        count = len(prompts)
        params = _one_each("sampling_params", sampling_params, SamplingParams, count)
        sparse = _one_each("sparse_configs", sparse_configs, SparseConfig, count, optional=True)
        ids = [self._prompt_ids(p, f"prompts[{i}]") for i, p in enumerate(prompts)]
        return [output.as_dict() for output in self._run(ids, params, sparse, use_tqdm)]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sparse_configs: SparseConfig | None | Sequence[SparseConfig | None] = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Answer one conversation, or several, with the checkpoint's chat template.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``, or a list of such lists.
            sampling_params, sparse_configs, use_tqdm: as in :meth:`generate`.

        Returns:
            As :meth:`generate`, one dictionary per conversation.

        Raises:
            TokenizerError: the checkpoint has no chat template.
        """
        conversations = _conversations(messages)
        count = len(conversations)
        params = _one_each("sampling_params", sampling_params, SamplingParams, count)
        sparse = _one_each("sparse_configs", sparse_configs, SparseConfig, count, optional=True)
        ids = [self.chat_ids(c) for c in conversations]
        return [output.as_dict() for output in self._run(ids, params, sparse, use_tqdm)]

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        sparse_config: SparseConfig | None = None,
    ) -> Iterator[CanvasStep]:
        """Watch one answer being filled in: an event per forward pass.

        The last event carries the finished output. Leaving the loop early drops the
        request.
        """
        params = _one_each("sampling_params", sampling_params, SamplingParams, 1)[0]
        ids = self._prompt_ids(prompt, "prompt")
        with self._lock:
            request = self._engine.make_request(ids, params, sparse_config, watch=True)
            self._engine.add(request)
            try:
                while is_live(request):
                    for _, canvas in self._engine.step().watched:
                        yield canvas
            finally:
                self._engine.abort(request)

    def chat_ids(self, messages: Messages) -> list[int]:
        """Prompt ids of a conversation, rendered with the chat template."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer, so chat() cannot be used")
        # the template writes the special tokens itself
        return tokenizer.encode(tokenizer.render_chat(messages), special=False)

    def _prompt_ids(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            if self._engine.tokenizer is None:
                raise TokenizerError(
                    f"{name} is a text, but the checkpoint has no tokenizer: give token ids"
                )
            return self._engine.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
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
        engine = self._engine
        with self._lock:
            requests: list[Request] = [
                engine.make_request(ids, params[i], sparse[i], name=f"prompts[{i}]")
                for i, ids in enumerate(prompts)
            ]
            outputs: dict[int, RequestOutput] = {}
            bar = tqdm(total=len(requests), desc="Generating", disable=not use_tqdm or not requests)
            try:
                for request in requests:
                    engine.add(request)
                while len(outputs) < len(requests):
                    for request, output in engine.step().finished:
                        outputs[request.id] = output
                        bar.update()
            finally:
                # after an error or Ctrl-C nothing of this call stays behind
                for request in requests:
                    engine.abort(request)
                bar.close()
        return [outputs[r.id] for r in requests]


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
    """One conversation or several, checked."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages must be a list of messages, got {type(messages).__name__}")
    several = list(messages) if messages and not isinstance(messages[0], Mapping) else [messages]
    if not messages:
        return []
    for place, conversation in enumerate(several):
        if not isinstance(conversation, Sequence) or not conversation:
            raise PromptError(f"conversation {place} must be a non-empty list of messages")
        for message in conversation:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise PromptError(
                    "a message needs 'role' and 'content', for example "
                    f"{{'role': 'user', 'content': 'Hi'}}; got {message!r}"
                )
            if not isinstance(message.get("content"), str):
                raise PromptError(f"a message's content must be a text, got {message!r}")
    return several
