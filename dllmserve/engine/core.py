"""EngineCore: the step loop. Sole owner of the mutable host state."""

from __future__ import annotations

import itertools
import operator
import random
from dataclasses import dataclass

import torch

from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.core.rows import row_inits
from dllmserve.core.scheduler import Scheduler
from dllmserve.engine.text import AnswerText
from dllmserve.engine.tokenizer import Tokenizer
from dllmserve.errors import (
    ContextLengthError,
    InvalidParameterError,
    OutOfMemoryError,
    PromptError,
)
from dllmserve.outputs import CanvasStep, RequestOutput
from dllmserve.registry import CACHE_POLICIES, resolve
from dllmserve.runtime.runner import ModelRunner, Proposals, StepHandle
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig

OOM_ADVICE = (
    "reduce max_model_len, use sparse attention, enable tensor parallelism (this version "
    "runs tensor_parallel_size=1 only), or lower max_num_seqs, max_num_batched_tokens or "
    "max_logit_rows"
)


@dataclass(frozen=True)
class StepEvents:
    """What a step brought: finished requests, and canvases of the watched ones."""

    finished: list[tuple[Request, RequestOutput]]
    watched: list[tuple[Request, CanvasStep]]


class EngineCore:
    """Requests in, steps, outputs.

    Args:
        scheduler: host state.
        runner: device state.
        tokenizer: None for checkpoints without one; text is then "".
        seed: base for requests without a seed; None draws it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        seed: int | None,
    ) -> None:
        self.scheduler = scheduler
        self.spec: ModelSpec = runner.spec
        self.tokenizer = tokenizer
        self._runner = runner
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._text = AnswerText(tokenizer)

    def make_request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        sparse: SparseConfig | None,
        *,
        watch: bool = False,
        name: str = "prompt",
    ) -> Request:
        """Check a request against the model and the engine, without queueing it.

        Raises:
            PromptError, ContextLengthError, InvalidParameterError, CapacityError.
        """
        if sparse is not None and not sparse.enabled:
            sparse = None
        prompt_ids = _checked_prompt(prompt_ids, self.spec, name)
        limit = self.scheduler.limits.max_model_len
        total = len(prompt_ids) + params.gen_length
        if total > limit:
            raise ContextLengthError(
                f"{name} has {len(prompt_ids)} tokens and gen_length is {params.gen_length}: "
                f"{total} together, over max_model_len={limit}"
            )
        if sparse is not None and params.cache != "none":
            raise InvalidParameterError(
                f"a SparseConfig and cache={params.cache!r} exclude each other: "
                "use cache='none' with sparse attention, or no SparseConfig"
            )
        if params.stop_strings and self.tokenizer is None:
            raise InvalidParameterError("stop needs a tokenizer, and this checkpoint has none")
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = Request(
            id=next(self._ids),
            prompt_ids=prompt_ids,
            params=params,
            sparse=sparse,
            seed=seed,
            policy="sparse" if sparse is not None else params.cache,
            watch=watch,
        )
        if reasons := resolve(CACHE_POLICIES, request.policy)().unsupported(self.spec):
            raise InvalidParameterError(f"cache {request.policy!r}: {'; '.join(reasons)}")
        self.scheduler.check(request)
        return request

    def add(self, request: Request) -> None:
        """Queue a request made by :meth:`make_request`."""
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Drop a request and free what it holds."""
        self.scheduler.abort(request)

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work

    def step(self) -> StepEvents:
        """Run one forward pass and return what came of it.

        Raises:
            OutOfMemoryError: the device ran out of memory in this step.
        """
        if not self.has_work:
            return StepEvents([], [])
        plan, requests, admitted = self.scheduler.schedule()
        try:
            for request in admitted:
                for init in row_inits(request, self.spec.mask_id):
                    self._runner.admit(init)
            handle = self._runner.execute(plan)
            reports = handle.result()
        except RuntimeError as error:  # torch's out-of-memory errors derive from it
            if not is_out_of_memory(error):
                raise
            first = str(error).strip().splitlines()[0]
            raise OutOfMemoryError(
                f"out of memory in a step of {plan.tokens} tokens ({first}): {OOM_ADVICE}"
            ) from error
        before = [request.progress.frontier for request in requests]
        finished = self.scheduler.commit(requests, reports)
        outputs: list[tuple[Request, RequestOutput]] = []
        for request, report, frontier in zip(requests, reports, before, strict=True):
            if request.error is not None:
                self.scheduler.release(request)
                continue
            if request not in finished and report.frontier == frontier:
                continue  # no new text, so no stop string either
            output = self._output(request, report.eos, request in finished)
            if output is not None:
                outputs.append((request, output))
        done = {request.id: output for request, output in outputs}
        watched = [
            (request, self._canvas(index, request, handle, done.get(request.id)))
            for index, request in enumerate(requests)
            if request.watch and request.error is None
        ]
        for request, _ in outputs:
            self.scheduler.release(request)
        return StepEvents(outputs, watched)

    def _output(self, request: Request, eos: int, finished: bool) -> RequestOutput | None:
        """The output of a request that ended in this step, by itself or by a stop string."""
        params = request.params
        if not finished and not params.stop_strings:
            return None
        count = eos + 1 if eos >= 0 else request.progress.frontier
        ids = self._runner.table.read_answer(request.row, count)
        text, used, stopped = self._text.read(ids, params.stop_strings)
        if stopped:
            request.finish_reason = "stop"
        elif not finished:
            return None
        return RequestOutput(
            text=text,
            token_ids=ids[:used],
            finish_reason=request.finish_reason or "length",
            prompt_tokens=request.prompt_len,
            completion_tokens=used,
            forward_passes=request.progress.forwards,
        )

    def _canvas(
        self, index: int, request: Request, handle: StepHandle, output: RequestOutput | None
    ) -> CanvasStep:
        """A picture of the answer after the step."""
        table = self._runner.table
        ids: list[int | None] = list(table.read_answer(request.row, request.params.gen_length))
        masked = table.read_masked(request.row)
        proposals: Proposals = handle.proposals
        start, width = handle.blocks[index]
        proposed = proposals.tokens[index, :width].tolist()
        values = proposals.confidence[index, :width].tolist()
        confidence: list[float | None] = [None] * len(ids)
        shown: list[int | None] = [None if m else t for m, t in zip(masked, ids, strict=True)]
        for offset, (token, value) in enumerate(zip(proposed, values, strict=True)):
            place = start - request.prompt_len + offset
            if value != float("-inf"):
                confidence[place] = value
                if masked[place]:
                    shown[place] = token
        block = start - request.prompt_len
        return CanvasStep(
            token_ids=shown,
            committed=[not m for m in masked],
            confidence=confidence,
            block=(block, block + width),
            forward_passes=request.progress.forwards,
            output=output,
        )


def _checked_prompt(ids: list[int], spec: ModelSpec, name: str) -> list[int]:
    """The prompt as plain ints (numpy integers are welcome), or an error that says where."""
    if not ids:
        raise PromptError(f"{name} is empty: give at least one token")
    checked = []
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise PromptError(f"{name}[{place}] must be an integer token id, got {token!r}")
        if not 0 <= token < spec.vocab_size:
            raise PromptError(
                f"{name}[{place}] is {token}, outside the vocabulary 0..{spec.vocab_size - 1}"
            )
        checked.append(operator.index(token))
    return checked


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch, on any device, says that memory ran out."""
    text = str(error)
    cpu = "DefaultCPUAllocator" in text or "allocate memory" in text
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or cpu
