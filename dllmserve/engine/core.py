"""EngineCore: the step loop. Sole owner of the mutable host state."""

from __future__ import annotations

import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from dllmserve.constraints.compiled import Compiled
from dllmserve.core.canvas import Canvas
from dllmserve.core.constrained import begin
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.request import Request, Status
from dllmserve.core.rows import ends_of, row_inits
from dllmserve.core.scheduler import Scheduler
from dllmserve.core.validator import RequestValidator
from dllmserve.decoding.noise import CanvasNoise
from dllmserve.engine.filled import with_holes
from dllmserve.engine.grammars import Grammars
from dllmserve.engine.history import AnswerHistory
from dllmserve.engine.logprobs import AnswerLogprobs
from dllmserve.engine.machine import with_threads
from dllmserve.engine.sizing import memory_advice
from dllmserve.engine.tokenizer import AnswerText, Tokenizer
from dllmserve.errors import ConfigError, OutOfMemoryError
from dllmserve.holes import Holes
from dllmserve.outputs import CanvasStep, RequestOutput, TokenLogprob
from dllmserve.runtime.platform import (
    first_line,
    is_out_of_memory,
    on_device,
    release_cached_memory,
)
from dllmserve.runtime.runner import ModelRunner, StepHandle, StepRunner
from dllmserve.sampling_params import SamplingParams


@dataclass(frozen=True)
class StepEvents:
    """What a step brought.

    Attributes:
        finished: requests that ended, with their outputs.
        watched: canvases of the watched requests.
        streamed: ids that a streamed request has added to its committed prefix, and their
            log-probabilities if it asks for them; the last ones come with its output.
        failed: requests that ended with their ``error`` set.
        committed: positions that joined the committed prefixes of all requests.
    """

    finished: list[tuple[Request, RequestOutput]] = field(default_factory=list)
    watched: list[tuple[Request, CanvasStep]] = field(default_factory=list)
    streamed: list[tuple[Request, list[int], list[TokenLogprob] | None]] = field(
        default_factory=list
    )
    failed: list[Request] = field(default_factory=list)
    committed: int = 0


@dataclass(frozen=True)
class _InFlightStep:
    """A step that was launched and not yet taken in; without a handle, one that failed."""

    requests: list[Request]
    handle: StepHandle | None
    error: OutOfMemoryError | None = None

    @cached_property
    def foreseen(self) -> bool:
        """True if the next step can be planned without this one's report."""
        return self.handle is not None and all(r.predictable for r in self.requests)

    @property
    def over(self) -> bool:
        """True if every request in it has ended."""
        return all(r.status is not Status.RUNNING for r in self.requests)


class EngineCore:
    """Requests in, steps, outputs.

    Args:
        scheduler: host state.
        runner: device state.
        tokenizer: None for checkpoints without one; text is then "".
        seed: base for requests without a seed; None draws it.
        depth: steps that may be in flight before the host waits for the oldest.
        threads: of torch in a step; None leaves their number alone.

    Attributes:
        observers: called with every plan that is launched.
        on_admitted: called with the requests that a step admits, before it is launched;
            what a crash may have to do with is then known outside.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        tokenizer: Tokenizer | None,
        seed: int | None,
        depth: int = 1,
        threads: int | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.spec: ModelSpec = runner.spec
        self.tokenizer = tokenizer
        self._runner = runner
        self._validator = RequestValidator(self.spec, scheduler.limits, tokenizer is not None)
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._text = AnswerText(tokenizer)
        self._grammars = Grammars(self.spec, tokenizer)
        self._depth = depth
        self._threads = threads
        self._in_flight: deque[_InFlightStep] = deque()
        #: requests whose constraints leave one answer alone, which no forward has to find
        self._known: list[Request] = []
        self._logprobs = weakref.WeakKeyDictionary[Request, AnswerLogprobs]()
        self._traced = weakref.WeakKeyDictionary[Request, AnswerHistory]()
        self.observers: list[Callable[[StepPlan], None]] = []
        self.on_admitted: Callable[[list[Request]], None] | None = None

    def make_request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        holes: Holes = (),
        watch: bool = False,
        stream: bool = False,
        owner: str = "",
        candidates: tuple[tuple[int, ...], ...] = (),
        trace: bool = False,
        canvas: Canvas | None = None,
        name: str = "prompt",
        grammars: Sequence[Compiled | None] | None = None,
    ) -> Request:
        """Check a request against the model and the engine, without queueing it.

        Args:
            prompt_ids, params, holes, watch, stream, owner, candidates, trace: see
                :class:`dllmserve.core.request.Request`. With holes, the ids are a whole row.
            canvas: see :meth:`dllmserve.core.validator.RequestValidator.request`.
            name: of the prompt, in errors.
            grammars: what the answer, or each hole, has to match; None compiles what they ask for.

        Raises:
            PromptError, ContextLengthError, InvalidParameterError, CapacityError.
        """
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = self._validator.request(
            next(self._ids),
            prompt_ids,
            params,
            holes=holes,
            seed=seed,
            watch=watch,
            stream=stream,
            owner=owner,
            candidates=candidates,
            trace=trace,
            canvas=canvas,
            name=name,
            grammars=self._grammars.of(params, holes) if grammars is None else grammars,
        )
        begin(request, ends_of(request.params, self.spec))
        return request

    def use_noise(self, noise: CanvasNoise) -> None:
        """Take the noise of canvases from elsewhere.

        Raises:
            ConfigError: several ranks would have to do so, or the model has none.
        """
        if not self.spec.noise:
            raise ConfigError("this model has masks, and no noise that could be replaced")
        if not isinstance(self._runner, ModelRunner):
            raise ConfigError("noise can be replaced with tensor_parallel_size=1 only")
        self._runner.table.noise = noise
        if self._runner.graphs is not None:
            self._runner.graphs.clear()  # they were captured with the other

    @property
    def validator(self) -> RequestValidator:
        """What requests are held against."""
        return self._validator

    def add(self, request: Request) -> None:
        """Queue a request made by :meth:`make_request`."""
        if request.launched:
            self._known.append(request)
        else:
            self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Drop a request and free what it holds."""
        if request in self._known:
            self._known.remove(request)
        self.scheduler.abort(request)

    def abandon(self) -> None:
        """Forget the steps in flight, after an error that left their requests in doubt."""
        self._in_flight.clear()
        self.scheduler.storage.pages.forget()

    def close(self) -> None:
        """Let go of what the engine holds beside memory; nothing can be run any more."""
        self._runner.close()

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self.scheduler.has_work or bool(self._known)

    def step(self) -> StepEvents:
        """Launch what can be launched, then take in the oldest step and return what came of it.

        Out of memory ends the requests that do not fit by themselves, with their
        ``error`` set; the others go on.
        """
        with on_device(self._runner.table.device), with_threads(self._threads):
            return self._step()

    def _step(self) -> StepEvents:
        if self._known:
            return self._report_known()
        while len(self._in_flight) < self._depth:
            # the next step of a request that cannot be foreseen needs its last report
            if not all(step.foreseen for step in self._in_flight):
                break
            if not self._launch():
                break
        if not self._in_flight:
            return StepEvents()
        events = self._land(self._in_flight.popleft())
        # launched for answers that have ended early: nobody waits for their reports
        while self._in_flight and self._in_flight[0].over:
            self._in_flight.popleft()
        return events

    def _report_known(self) -> StepEvents:
        """End the requests that need no forward."""
        events = StepEvents()
        for request in self._known:
            length = request.canvas.answer_len
            ids = request.with_forced(list(request.canvas.ids[request.canvas.start :])[:length])
            ids = request.with_forced([*ids, *[0] * (length - len(ids))])
            ends = ends_of(request.params, self.spec)
            end = next((i for i, token in enumerate(ids) if token in ends), length - 1)
            request.status, request.finish_reason = Status.FINISHED, "stop"
            steps = request.steps_of([0] * (end + 1))
            output = self._ended(request, ids[: end + 1], steps, True)
            if output is not None:
                events.finished.append((request, output))
        self._known = []
        return events

    def _launch(self) -> bool:
        """Plan a step and start it; False if there is nothing to plan now."""
        plan, requests, admitted = self.scheduler.schedule()
        if admitted and self.on_admitted is not None:
            self.on_admitted(admitted)
        lost = [request for request in admitted if not self._fill_rows(request)]
        if lost:
            kept = [i for i, request in enumerate(requests) if request not in lost]
            plan = replace(plan, entries=tuple(plan.entries[i] for i in kept))
            requests = [requests[i] for i in kept]
        if not requests:
            return bool(lost)
        for observer in tuple(self.observers):  # one may leave in its own call
            observer(plan)
        for part, members, error in self._execute(plan, requests):
            if isinstance(part, StepHandle):
                self.scheduler.assume(members)
                self._in_flight.append(_InFlightStep(members, part))
            else:
                self._in_flight.append(_InFlightStep(members, None, error))
        return True

    def _fill_rows(self, request: Request) -> bool:
        """Fill the rows of an admitted request; False if there is no memory even for that."""
        for attempt in range(2):
            try:
                for init in row_inits(request, self.spec):
                    self._runner.admit(init)
                return True
            except (RuntimeError, MemoryError) as error:
                if not self._can_recover(error):
                    raise
                reason = first_line(error)
            if attempt == 0:
                release_cached_memory()
        failure = OutOfMemoryError(
            f"out of memory at admission ({reason}): {memory_advice(self.spec)}"
        )
        self._in_flight.append(_InFlightStep([request], None, failure))
        return False

    def _can_recover(self, error: BaseException) -> bool:
        return self._runner.recovers and is_out_of_memory(error)

    def _execute(
        self, plan: StepPlan, requests: list[Request]
    ) -> list[tuple[StepHandle | None, list[Request], OutOfMemoryError | None]]:
        """Start a plan; if memory runs out, its halves, down to single requests.

        A forward works out all that it writes to the rows before it writes any of it, and writing
        takes no memory; so it can be run again.
        """
        try:
            return [(self._runner.execute(plan), requests, None)]
        except (RuntimeError, MemoryError) as error:
            if not self._can_recover(error):
                raise
            reason = first_line(error)
        # outside the handler, whose traceback holds on to the failed step's tensors
        if len(requests) == 1:
            failure = OutOfMemoryError(
                f"out of memory in a step of {plan.tokens} tokens ({reason}): "
                f"{memory_advice(self.spec)}"
            )
            return [(None, requests, failure)]
        release_cached_memory()
        half = len(requests) // 2
        first = self._execute(plan.part(0, half), requests[:half])
        for handle, _, _ in first:
            if handle is not None:
                handle.keep_proposals()
        return [*first, *self._execute(plan.part(half), requests[half:])]

    def _land(self, step: _InFlightStep) -> StepEvents:
        """Wait for a step's report and act on it."""
        requests, handle = step.requests, step.handle
        if handle is None:
            return self._give_up(step)
        reports = [
            report.within(request.canvas.answer_len)
            for request, report in zip(requests, handle.result(), strict=True)
        ]
        live = [r.status is Status.RUNNING for r in requests]
        before = [request.progress.frontier for request in requests]
        finished = self.scheduler.commit(requests, reports)
        events = StepEvents()
        committed = 0
        for index, request in enumerate(requests):
            if not live[index]:
                continue
            if request.error is not None:
                self.scheduler.release(request)
                events.failed.append(request)
                continue
            output = None
            self._note_logprobs(index, request, handle)
            # without new text there is no stop string either
            frontier = request.progress.frontier
            if request in finished or frontier != before[index]:
                committed += frontier - before[index]
                output = self._output(request, handle, request in finished)
                if output is None and request.stream:
                    low = before[index]
                    ids = self._runner.table.read_settled(request.row, low, frontier)
                    ids = request.with_forced(ids, low)
                    events.streamed.append((request, ids, self._logprobs_of(request, ids, low)))
            # a forward that only stores has no block, and nothing to show
            if (request.watch or request.trace) and handle.blocks[index][1]:
                canvas = self._canvas(index, request, handle)
                output = self._traced_output(request, canvas, output)
                if request.watch:
                    events.watched.append((request, replace(canvas, output=output)))
            if output is not None:
                events.finished.append((request, output))
        for request, _ in events.finished:
            self.scheduler.release(request)
        return replace(events, committed=committed)

    def _give_up(self, step: _InFlightStep) -> StepEvents:
        """End the requests of a step that could not be launched."""
        events = StepEvents()
        for request in step.requests:
            if request.status is Status.RUNNING:
                request.error = step.error
                self.scheduler.release(request)
                events.failed.append(request)
        return events

    def _output(self, request: Request, handle: StepHandle, finished: bool) -> RequestOutput | None:
        """The output of a request that ended in this step, by itself or by a stop string."""
        if not finished and not request.params.stop_strings:
            return None
        eos = request.progress.eos
        count = eos + 1 if eos >= 0 else request.progress.frontier
        read = handle.answer(request.row, count)
        ids, steps = read or self._runner.table.read_written(request.row, count)
        return self._ended(request, request.with_forced(ids), request.steps_of(steps), finished)

    def _ended(
        self, request: Request, ids: list[int], steps: list[int], finished: bool
    ) -> RequestOutput | None:
        """The output of a request whose answer begins so, if that ends it."""
        text, used, stopped = self._text.read(ids, request.params.stop_strings)
        if stopped:
            request.finish_reason = "stop"
        elif not finished:
            return None
        self.scheduler.learn(request, ids)
        kept = self._logprobs.get(request)
        output = RequestOutput(
            text=text,
            token_ids=ids[:used],
            finish_reason=request.finish_reason or "length",
            prompt_tokens=request.prompt_len,
            completion_tokens=request.canvas.filled(used),
            forward_passes=request.reported_forwards,
            cached_tokens=0 if request.prefix is None else request.prefix.cached,
            edits=request.progress.edits,
            steps=steps[:used],
            logprobs=self._logprobs_of(request, ids[:used]),
            candidate_logprobs=kept.candidates(used) if kept and request.candidates else None,
        )
        return with_holes(output, request, self.spec, self.tokenizer) if request.holes else output

    def _note_logprobs(self, index: int, request: Request, handle: StepHandle) -> None:
        """Keep what a step says of log-probabilities that a request asks for."""
        if request.params.logprobs is None and not request.candidates:
            return
        found = handle.logprobs(index)
        if found is not None:
            if request not in self._logprobs:
                self._logprobs[request] = AnswerLogprobs(request)
            self._logprobs[request].note(handle.blocks[index][0], *found)

    def _logprobs_of(
        self, request: Request, ids: list[int], start: int = 0
    ) -> list[TokenLogprob] | None:
        """Log-probabilities of the answer's ids from ``start`` on, if they are asked for."""
        if request.params.logprobs is None:
            return None
        kept = self._logprobs.get(request) or AnswerLogprobs(request)
        return kept.read(ids, start)

    def _traced_output(
        self, request: Request, canvas: CanvasStep, output: RequestOutput | None
    ) -> RequestOutput | None:
        """Note what the step did, if the request asks for it; the output tells of all steps."""
        if not request.trace:
            return output
        if request not in self._traced:
            self._traced[request] = AnswerHistory()
        history = self._traced[request]
        history.note(canvas)
        return None if output is None else replace(output, history=history.forwards)

    def _canvas(self, index: int, request: Request, handle: StepHandle) -> CanvasStep:
        """A picture of the answer after the step."""
        table = self._runner.table
        length = request.canvas.answer_len
        ids: list[int | None] = [*request.with_forced(table.read_answer(request.row, length))]
        masked = table.read_masked(request.row)[:length]
        for position in request.forced:
            if position - request.canvas.start < length:
                masked[position - request.canvas.start] = False
        first, width = handle.blocks[index]
        block = first - request.canvas.start
        proposed, values = handle.proposed(index)
        confidence: list[float | None] = [None] * len(ids)
        shown: list[int | None] = [None if m else t for m, t in zip(masked, ids, strict=True)]
        for offset, (token, value) in enumerate(zip(proposed, values, strict=True)):
            column = block + offset
            if value != float("-inf") and 0 <= column < length:
                confidence[column] = value
                if masked[column]:
                    shown[column] = token
        return CanvasStep(
            token_ids=shown,
            committed=[not m for m in masked],
            confidence=confidence,
            # a block may hold given tokens before the answer's start and behind its end
            block=(min(max(block, 0), length), min(max(block + width, 0), length)),
            forward_passes=request.progress.forwards,
            edited=[p for p in (block + e for e in handle.edited(index)) if 0 <= p < length],
        )
