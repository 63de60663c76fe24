"""Scheduler: which requests run in the next step, under which budget.

Admission reserves everything a request will ever need (rows and pages, since the canvas
length is known), so an admitted request is never preempted and never runs out. What can
never fit is refused at once, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dllmserve.catalog import RULES
from dllmserve.core.budget import NO_LIMIT, StepBudget
from dllmserve.core.fair import FairQueue, within_share
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.pages import PageAllocator
from dllmserve.core.plan import Span, StepEntry, StepPlan, Write
from dllmserve.core.request import Request, Status
from dllmserve.errors import CapacityError, EngineError

#: How many younger requests may be admitted past the oldest waiting one.
MAX_SKIPS = 16
#: How many requests that must wait are looked past in a step, divided by the owners who wait but at
#: least one of each, so that a long queue costs no more and nobody is hidden behind others.
MAX_LOOKED_PAST = 32

#: A rule that masks positions again may take this many forwards for each position of a block
#: before it counts as stuck. (WINO masks at most one less again than it wrote in the forward
#: before, so a block of n takes at most n + 29.)
MAX_REVOKING = 32

#: LM-head chunks of max_logit_rows that one step may take; a single request may take more.
HEAD_CHUNKS = 8


class SpanSource(Protocol):
    """The part of a cache policy that the scheduler uses."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """K,V slots that one row needs."""
        ...

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """The request's next span."""
        ...


@dataclass(frozen=True)
class EntryReport:
    """What the runner says of one entry after a step.

    Attributes:
        masks_left: masked positions left in the block.
        frontier: answer positions unmasked without a gap, from the left.
        eos: answer index of the first end-of-sequence id before the frontier, or -1.
        broken: LM-head rows whose logits were not numbers; any ends the request.
        end: answer index of the first end-of-sequence id that stands anywhere, or -1.
    """

    masks_left: int
    frontier: int
    eos: int
    broken: int = 0
    end: int = -1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Fixed sizes of an engine that the scheduler packs against.

    ``max_refresh_tokens`` is how many tokens of a step may be refreshes, so that refreshes
    of different requests do not line up; soft for the first one. ``phases`` is "mixed"
    (refresh and reuse spans share steps), "separate", or "auto": refreshes that fill half
    a step run by themselves, fewer share a step with reuse spans. ``max_history_rows`` is how
    many positions may have their last distribution kept; with 0 nothing is kept of logits.
    ``cheap_tokens`` is with how many a step computes half as many a second as it can: steps that
    owners share are not made smaller than that.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logit_rows: int
    page_size: int
    num_pages: int
    max_refresh_tokens: int = NO_LIMIT
    phases: str = "auto"
    max_history_rows: int = 0
    cheap_tokens: int = 0

    def check(self, request: Request, slots: int) -> None:
        """Raise CapacityError if the request can never run within these sizes.

        Args:
            request: the request.
            slots: K,V slots that one of its rows needs.
        """
        tokens = request.canvas_len * request.rows_needed + request.shadow_len
        if tokens > self.max_num_batched_tokens:
            raise CapacityError(
                f"the request needs {tokens} tokens in one step, over "
                f"max_num_batched_tokens={self.max_num_batched_tokens}: raise it to {tokens} "
                f"or shorten the prompt or {request.params.length_name}"
            )
        if request.rows_needed > self.max_num_seqs:
            raise CapacityError(
                f"cfg_scale > 0 takes {request.rows_needed} rows, over "
                f"max_num_seqs={self.max_num_seqs}: raise it to {request.rows_needed}"
            )
        self._check_history(request)
        pages = -(-slots // self.page_size) * request.rows_needed
        if pages > self.num_pages:
            raise CapacityError(
                f"the request needs {pages} K,V pages of {self.page_size} tokens, the engine "
                f"has kv_pages={self.num_pages}: raise kv_pages to {pages}, shorten the "
                f"prompt or {request.params.length_name}, or use cache='none'"
            )

    def _check_history(self, request: Request) -> None:
        """What a rule keeps of logits has to have room."""
        rule, needed = request.params.unmask, request.history_needed
        if RULES[rule].keeps and not self.max_history_rows:
            raise CapacityError(
                f"unmask={rule!r} keeps something of the logits between forwards, and the engine "
                "has reserved no memory for it (max_history_rows=0): make it with "
                f"max_history_rows={max(needed, 1)} or more, or use another rule"
            )
        if needed > self.max_history_rows:
            raise CapacityError(
                f"unmask={rule!r} keeps a distribution for each of {needed} positions of a block, "
                f"over max_history_rows={self.max_history_rows}: raise it to {needed}, or use a "
                "shorter block_length"
            )


class Scheduler:
    """Waiting and running requests, rows and pages.

    Args:
        spec: the model's dimensions.
        limits: the engine's sizes.
        policy: maps a policy name to its policy.
    """

    def __init__(
        self, spec: ModelSpec, limits: Limits, policy: Callable[[str], SpanSource]
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self.allocator = PageAllocator(limits.num_pages)
        self.history = PageAllocator(limits.max_history_rows)
        self._policy = policy
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._step = 0

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.waiting or self.running)

    def pages_needed(self, request: Request) -> int:
        """Pages that one row of the request reserves."""
        slots = self._policy(request.policy).slots(request, self.spec)
        return -(-slots // self.limits.page_size)

    def check(self, request: Request) -> None:
        """Raise CapacityError if the request can never run on this engine."""
        self.limits.check(request, self._policy(request.policy).slots(request, self.spec))

    def add(self, request: Request) -> None:
        """Queue a request. Raises CapacityError if it can never run."""
        self.check(request)
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Drop a request and free what it holds; finished ones are left alone."""
        if request.status is Status.WAITING:
            self.waiting.discard(request)  # not there if an interrupt hit its admission
        elif request.status is Status.RUNNING:
            self._release(request)
        else:
            return
        request.status = Status.ABORTED

    def schedule(self) -> tuple[StepPlan, list[Request], list[Request]]:
        """Admit what fits, then pack one step.

        Returns:
            The plan, the requests of its entries in the same order, and the requests
            admitted now (their rows must be initialised before the plan runs).
        """
        admitted = self._admit()
        limits = self.limits
        budget = StepBudget(
            tokens=limits.max_num_batched_tokens,
            logit_rows=limits.max_logit_rows * HEAD_CHUNKS,
            rows=limits.max_num_seqs,
            refresh_tokens=limits.max_refresh_tokens,
        )
        # whoever was left out of the last steps comes first: nobody starves
        order = sorted(self.running, key=lambda r: (r.last_step, r.id))
        ready = self.waiting.ration(
            [(r, self._entry(r)) for r in order if not r.launched], limits.cheap_tokens
        )
        phase = self._phase([entry for _, entry in ready])
        picked: list[tuple[Request, StepEntry]] = []
        for request, entry in ready:
            refresh = entry.span.refresh
            if phase is not None and refresh is not phase:
                continue
            if budget.take(entry.tokens, entry.logit_rows, request.rows_needed, refresh=refresh):
                request.last_step = self._step
                picked.append((request, entry))
        self.waiting.settle(picked)
        self._step += 1
        picked.sort(key=lambda pair: _packing_order(*pair))
        return StepPlan(tuple(e for _, e in picked)), [r for r, _ in picked], admitted

    def assume(self, requests: Sequence[Request]) -> None:
        """Advance the requests of a launched step without waiting for its report.

        Only a fixed schedule can be foreseen; others stay where they are until
        :meth:`commit`, and must not be scheduled before it.
        """
        for request in requests:
            if not request.predictable:
                continue
            progress = request.progress
            left = progress.masks_left - request.quota
            request.assumed.append(left)
            self._forward_done(request, left)

    def commit(self, requests: Sequence[Request], reports: Sequence[EntryReport]) -> list[Request]:
        """Take the runner's reports; return the requests that finished.

        Steps are committed in the order of their launch. A request with broken rows has
        finished with its ``error`` set. Finished requests keep their rows until
        :meth:`release` is called, so that their tokens can still be read. Reports of
        requests that have ended meanwhile (forwards launched ahead) are ignored.
        """
        finished = []
        for request, report in zip(requests, reports, strict=True):
            if request.status is not Status.RUNNING:
                continue
            if report.broken:
                request.error = EngineError(
                    "the model gave NaN or infinite logits after "
                    f"{request.reported_forwards} forwards: "
                    "its weights are damaged, or numbers overflow its dtype (try 'float32')"
                )
                finished.append(request)
                continue
            self._check_progress(request, report)
            request.progress.frontier = report.frontier
            request.progress.end = report.end
            if report.eos >= 0:
                request.finish_reason = "stop"
                finished.append(request)
            elif request.launched and not request.assumed:
                request.finish_reason = "length"
                finished.append(request)
        return finished

    def release(self, request: Request) -> None:
        """Mark a request finished and free its rows and pages."""
        self._release(request)
        request.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Raise ValueError unless rows and pages add up (for tests and idle checks)."""
        self.allocator.check_integrity()
        self.history.check_integrity()
        rows = sum(r.rows_needed for r in self.running) + len(self._free_rows)
        if rows != self.limits.max_num_seqs:
            raise ValueError(f"{rows} rows in use and free, expected {self.limits.max_num_seqs}")

    def _check_progress(self, request: Request, report: EntryReport) -> None:
        """Advance by a report, or hold it against what was assumed of it."""
        if request.assumed:
            expected = request.assumed.popleft()
            if report.masks_left != expected:
                raise EngineError(
                    f"request {request.id} has {report.masks_left} masks left in its block, its "
                    f"schedule leaves {expected}"
                )
            return
        if request.revokes:
            stuck = request.progress.step_in_block > MAX_REVOKING * max(request.blocks)
        else:
            stuck = report.masks_left >= request.progress.masks_left
        if stuck:
            raise EngineError(f"request {request.id} made no progress in a step")
        self._forward_done(request, report.masks_left)

    def _forward_done(self, request: Request, masks_left: int) -> None:
        progress = request.progress
        progress.forwards += 1
        progress.step_in_block += 1
        progress.wrote = max(progress.masks_left - masks_left, 0)
        progress.masks_left = masks_left
        if masks_left == 0:
            progress.block += 1
            progress.step_in_block = progress.wrote = 0
            if not request.launched:
                progress.masks_left = request.blocks[progress.block]
                progress.seen_before = max(progress.seen_before, progress.seen)
                progress.seen = request.visible

    def _admit(self) -> list[Request]:
        """In turns by owner; first come first served within each, with bounded skipping.

        A request that must wait for room may be passed by others, whoever's they are. One that
        would take more than its owner's share waits for what the same owner holds: only that
        owner's requests count as passing it, and only they wait when enough have.
        """
        admitted: list[Request] = []
        #: requests that wait, in the order of their turns, and whether for their own owner's share
        passed: list[tuple[Request, bool]] = []
        passed_over: set[str] = set()
        looked: Counter[str] = Counter()
        most = max(1, MAX_LOOKED_PAST // max(1, self.waiting.owners_waiting))
        worn = False  # somebody has been passed often enough
        while self._free_rows and not worn:
            request = self.waiting.pop(passed_over)
            if request is None:
                break
            beyond = self._beyond_share(request)
            if not beyond and self._fits(request):
                self._start(request)
                admitted.append(request)
                for other, own in passed:
                    other.skipped += not own or other.owner == request.owner
            else:
                passed.append((request, beyond))
                looked[request.owner] += 1
                if looked[request.owner] >= most:
                    passed_over.add(request.owner)
            for other, own in passed:
                if own and other.skipped >= MAX_SKIPS:
                    passed_over.add(other.owner)
                worn = worn or (not own and other.skipped >= MAX_SKIPS)
        self.waiting.put_back(request for request, _ in passed)
        return admitted

    def _needs(self, request: Request) -> tuple[int, ...]:
        """Rows, pages and kept distributions that the request reserves."""
        pages = self.pages_needed(request) * request.rows_needed
        return request.rows_needed, pages, request.history_needed

    def _free(self) -> tuple[int, ...]:
        """The same, of what nobody has."""
        return len(self._free_rows), self.allocator.num_free, self.history.num_free

    def _fits(self, request: Request) -> bool:
        return all(n <= f for n, f in zip(self._needs(request), self._free(), strict=True))

    def _beyond_share(self, request: Request) -> bool:
        """Whether its owner would have too much; nobody has who is alone and has no name."""
        if not request.owner:
            return False
        parts = zip(
            self.waiting.held(request.owner), self._needs(request), self._free(), strict=True
        )
        return not all(within_share(*part) for part in parts)

    def _start(self, request: Request) -> None:
        pages = self.pages_needed(request)
        request.row = self._free_rows.pop()
        request.pages = self.allocator.reserve(pages)
        request.history = self.history.reserve(request.history_needed)
        if request.guided:
            request.uncond_row = self._free_rows.pop()
            request.uncond_pages = self.allocator.reserve(pages)
        self.waiting.start(request, self._needs(request))
        request.status = Status.RUNNING
        request.last_step = self._step - 1
        self.running.append(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.end(request, self._needs(request))
        self._free_rows.append(request.row)
        self.allocator.free(request.pages)
        self.history.free(request.history)
        if request.guided:
            self._free_rows.append(request.uncond_row)
            self.allocator.free(request.uncond_pages)
        request.pages, request.uncond_pages, request.history = [], [], []

    def _phase(self, entries: list[StepEntry]) -> bool | None:
        """Which spans a step takes: True for refreshes alone, False for reuse, None for both.

        The oldest entry always belongs to it.
        """
        phases, limit = self.limits.phases, self.limits.max_num_batched_tokens
        if phases == "mixed" or not entries:
            return None
        oldest = entries[0].span.refresh
        if phases == "separate":
            return oldest
        # a step that refreshes can fill by themselves gains nothing from reuse spans, and
        # requests that were in step stay in step
        refreshing = sum(entry.tokens for entry in entries if entry.span.refresh)
        return True if oldest and 2 * refreshing >= limit else None

    def _entry(self, request: Request) -> StepEntry:
        policy, progress = self._policy(request.policy), request.progress
        span = policy.span(request, self.spec, request.row)
        uncond = shadow = None
        if request.guided:
            uncond = policy.span(request, self.spec, request.uncond_row)
        if request.revokes:
            span, shadow = with_shadow(span, request.visible, self.spec.logit_shift)
        return StepEntry(
            span=span,
            uncond=uncond,
            masks=progress.masks_left,
            rule=request.params.unmask,
            last=request.predictable
            and progress.block == len(request.blocks) - 1
            and progress.masks_left == request.quota,
            shadow=shadow,
        )


def with_shadow(span: Span, seen: int, shift: int) -> tuple[Span, Span]:
    """A span whose K,V are stored before anything attends, and the shadow that reads them.

    Args:
        span: writes all its K,V, or covers all that it sees.
        seen: canvas positions that are seen.
        shift: 1 for models that read the logits of position p at p - 1.
    """
    shadow = Span(
        row=span.row,
        q_start=span.blk_start - shift,
        q_len=span.blk_len,
        ctx_len=seen,
        write=int(Write.SHADOW),
        keep=shift,
        blk_off=0,
        blk_len=0,
        stair=0,
    )
    return span._replace(write=int(Write.FIRST), ctx_len=seen), shadow


def _packing_order(request: Request, entry: StepEntry) -> tuple[object, ...]:
    """Guided entries last; then like with like, so that kernels see few, large groups."""
    params = request.params
    span = entry.span
    filtered = params.top_k > 0 or params.top_p < 1
    shape = (span.q_len, span.ctx_len, span.write, span.q_start, span.keep, span.blk_off)
    state = "" if RULES[entry.rule].plain else entry.rule
    kind = (entry.uncond is not None, entry.shadow is not None, state)
    needs = (params.temperature > 0, filtered, params.confidence_eos_eot_inf)
    return (*kind, *needs, shape, request.id)
