"""Scheduler: which requests run in the next step, under which budget.

What can never fit is refused at once, with the reason. Most requests reserve all that they will
ever need before they start, so they never run out. Requests whose cache policy grows get pages as
they go; if there are none, an older one takes those of a younger one, which keeps its row, and
computes its K,V anew when it gets pages again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence

from dllmserve.core.budget import NO_LIMIT, SoftLimit, StepBudget
from dllmserve.core.constrained import settle
from dllmserve.core.fair import FairQueue, within_share
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import (
    EntryReport,
    Kind,
    NewToken,
    Part,
    StepEntry,
    StepPlan,
    with_blind,
)
from dllmserve.core.request import Request, Status
from dllmserve.core.rows import ends_of
from dllmserve.core.storage import SpanSource, Storage, new_pages
from dllmserve.errors import EngineError

#: How many younger requests may be admitted past the oldest waiting one.
MAX_SKIPS = 16
#: How many requests that must wait are looked past in a step, divided by the owners who wait but at
#: least one of each, so that a long queue costs no more and nobody is hidden behind others.
MAX_LOOKED_PAST = 32

#: A rule that masks positions again may take this many forwards for each position of a block
#: before it counts as stuck. (WINO masks at most one less again than it wrote in the forward
#: before, so a block of n takes at most n + 29.)
MAX_REVOKING = 32

#: Tokens of a step that keep any device busy.
FULL_STEP = 8192
#: One of so many pages stays free when a request that grows starts, or comes back after it has lost
#: its pages, while others run: they need more soon, and would take those that it got at once.
SPARE_PAGES = 10

#: LM-head chunks of max_logit_rows that one step may take; a single request may take more.
HEAD_CHUNKS = 8


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
        self.storage = Storage(spec, limits, policy)
        self._policy = policy
        self._step = 0
        #: in the last step a running request had to wait for pages
        self._short = False

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raise what :meth:`Limits.check` does if the request can never run on this engine."""
        self.limits.check(request, self._policy(request.policy).slots(request, self.spec))

    def add(self, request: Request) -> None:
        """Queue a request, once it is checked."""
        self.check(request)
        request.prefix = self.storage.prefix_of(request)
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
            refreshes=SoftLimit(limits.max_refresh_tokens),
        )
        ready = self._ready()
        budget.stores.tokens = self._store_tokens([entry for _, entry in ready])
        rationed = self.waiting.ration(ready, limits.cheap_tokens)
        picked: dict[Request, StepEntry] = {}
        phase = self._phase([entry for _, entry in rationed])
        for request, entry in rationed:
            if phase is None or entry.span.refresh is phase:
                self._pick(request, entry, budget, picked)
        self.waiting.settle(picked.items())
        self._step += 1
        packed = sorted(picked.items(), key=lambda pair: _packing_order(*pair))
        requests = [r for r, _ in packed]
        plan = StepPlan(tuple(e for _, e in packed), new_pages(requests), _known_tokens(requests))
        return plan, requests, admitted

    def _ready(self) -> list[tuple[Request, StepEntry]]:
        """Who may be in the step, with what, the one that was left out longest first.

        One that grows and cannot have the pages that it needs waits, and so does whoever came after
        it and needs some: pages that are free then are the older one's. One that has none waits for
        some to spare; others go on meanwhile, but nobody starts.
        """
        entries, self._short, waits = {}, False, False
        for request in self.running:
            if request.launched:
                continue
            entry = self._fitted(request, self.limits.max_num_batched_tokens)
            missing = self.storage.missing(request, entry.span) if request.grows else 0
            if missing and not request.pages and (waits or not self._may_begin(request)):
                waits = True
                continue
            if missing and not self._short:
                pages, victims = missing * request.rows_needed, self._victims(request, ())
                self._short = self.storage.to_take(pages, victims) is None
            if not (missing and self._short):
                entries[request] = entry
        self._short = self._short or waits
        return sorted(entries.items(), key=lambda pair: (pair[0].last_step, pair[0].id))

    def _store_tokens(self, entries: list[StepEntry]) -> int:
        """Tokens of prompts that a step stores while others decode, so that those do not stall.

        It is a full step's where as many store as decode, and less in proportion; and in any case
        what costs a step little, or no more than the others' own tokens.
        """
        filling = [entry.tokens for entry in entries if not entry.stores]
        if not filling:
            return NO_LIMIT
        share = FULL_STEP * (len(entries) - len(filling)) // len(filling)
        return max(share, sum(filling), self.limits.cheap_tokens // 2)

    def _pick(
        self,
        request: Request,
        entry: StepEntry,
        budget: StepBudget,
        picked: dict[Request, StepEntry],
    ) -> None:
        """Take a request's forward into the step, if the step and the pages have room for it."""
        if request.prefix and self._may_begin(request) and self.storage.adopt(request):
            entry = self._fitted(request, self.limits.max_num_batched_tokens)
        room = min(budget.tokens, budget.stores.tokens) if entry.stores else budget.tokens
        # a chunk may have to be shorter, or begin anew: an older one may have taken the pages
        if (entry.stores and entry.tokens > room) or (request.grows and not request.pages):
            entry = self._fitted(request, room)
        limit = budget.stores if entry.stores else budget.refreshes if entry.span.refresh else None
        amount = entry.tokens, entry.logit_rows, request.rows_needed
        final = entry.span.final
        filling = self.storage.next_names(request, final)
        if filling and filling[0] in budget.filling:
            return  # another does the same in this step: what it stores is found in the next one
        if not budget.has(*amount, limit):
            return
        if request.grows and (missing := self.storage.missing(request, entry.span)):
            victims = self._victims(request, picked)
            if not (self._may_begin(request) and self.storage.grow(request, missing, victims)):
                self._short = True
                return
        budget.take(*amount, limit)
        budget.filling.update(filling)
        request.last_step = self._step
        request.progress.storing = final
        request.progress.deciding = entry.kind is Kind.FILL
        picked[request] = entry

    def _may_begin(self, request: Request) -> bool:
        """Whether a request may get pages: if it has none, for all that it has to store at once.

        The oldest always may, so that all come to an end.
        """
        if request.pages or not self.running or request is self.running[0]:
            return True
        left = self.storage.pages.num_free - self.storage.begins_with(request)
        return left >= self.limits.num_pages // SPARE_PAGES

    def _victims(self, request: Request, picked: Container[Request]) -> Iterator[Request]:
        """Running requests whose pages another may take: what came after it, the last first."""
        for other in reversed(self.running):
            if other is request:
                return
            if other.grows and other not in picked:
                yield other

    def _fitted(self, request: Request, tokens: int) -> StepEntry:
        """A request's next forward; one that stores may be cut to a chunk of ``tokens`` tokens.

        A chunk decides nothing, and ends where a window ends: that sees all of itself. It is one
        window at least.
        """
        entry = self._entry(request)
        span, most = entry.span, tokens // request.rows_needed
        if not entry.stores or span.q_len <= most:
            return entry
        window = span.mask_arg
        ends = (span.q_start + most) // window, span.q_start // window + 1
        length = max(ends) * window - span.q_start
        if length >= span.q_len:
            return entry
        chunk = {"q_len": length, "blk_off": 0, "blk_len": 0, "head": Part.NONE}
        uncond = None if entry.uncond is None else entry.uncond._replace(**chunk)
        return StepEntry(span._replace(**chunk), uncond, 0, entry.rule, stores=True)

    def assume(self, requests: Sequence[Request]) -> None:
        """Advance the requests of a launched step without waiting for its report.

        Only a fixed schedule can be foreseen; others stay where they are until
        :meth:`commit`, and must not be scheduled before it.
        """
        for request in requests:
            if not request.predictable:
                continue
            progress = request.progress
            left = progress.masks_left - request.quota if progress.deciding else None
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
                self.storage.pages.forget(request.pages)  # they may be why
                request.error = EngineError(
                    "the model gave NaN or infinite logits after "
                    f"{request.reported_forwards} forwards: "
                    "its weights are damaged, or numbers overflow its dtype (try 'float32')"
                )
                finished.append(request)
                continue
            self._check_progress(request, report)
            if request.params.edits:
                report = report.within(request.settled)
            if request.regions:
                report = settle(request, report, ends_of(request.params, self.spec))
            request.progress.frontier = report.frontier
            request.progress.end, request.progress.eos = report.end, report.eos
            if report.eos >= 0:
                request.finish_reason = "stop"
                finished.append(request)
            elif report.frontier >= request.canvas.answer_len or (
                request.launched and not request.assumed
            ):
                request.finish_reason = "stop" if request.regions else "length"
                finished.append(request)
        return finished

    def learn(self, request: Request, answer: Sequence[int]) -> None:
        """Take the first ids of an answer, so that a request that goes on from it finds its K,V."""
        if request.prefix is not None:
            request.prefix.names.learn([*request.canvas.ids[: request.canvas.start], *answer])
            self.storage.publish(request)

    def release(self, request: Request) -> None:
        """Mark a request finished and free its rows and pages."""
        self._release(request)
        request.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Raise ValueError unless rows and pages add up (for tests and idle checks)."""
        self.storage.check_integrity(self.running)

    def _check_progress(self, request: Request, report: EntryReport) -> None:
        """Advance by a report, or hold it against what was assumed of it."""
        if request.assumed:
            expected = request.assumed.popleft()
            if expected is not None and report.masks_left != expected:
                raise EngineError(
                    f"request {request.id} has {report.masks_left} masks left in its block, its "
                    f"schedule leaves {expected}"
                )
            return
        if not request.progress.deciding:
            self._forward_done(request, None)
            return
        if request.revokes:
            stuck = request.progress.step_in_block > MAX_REVOKING * request.longest_block
        elif request.noise:
            stuck = request.progress.step_in_block >= request.params.max_denoising_steps
        else:
            # without masks, a forward edits
            stuck = report.masks_left >= max(request.progress.masks_left, 1)
        if stuck:
            raise EngineError(f"request {request.id} made no progress in a step")
        self._forward_done(request, report.masks_left, report.edits)

    def _forward_done(self, request: Request, masks_left: int | None, edits: int = 0) -> None:
        """Advance by a forward that leaves so many masks in its block, or only stored (None)."""
        progress = request.progress
        if progress.storing:
            progress.stored = progress.storing
            self.storage.publish(request)
        if masks_left is not None:
            request.forward_done(masks_left, edits)

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
        while self.storage.rows and not worn:
            request = self.waiting.pop(passed_over)
            if request is None:
                break
            beyond = self._beyond_share(request)
            if not beyond and self._has_room(request):
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

    def _has_room(self, request: Request) -> bool:
        """Whether a request can start. What runs and waits for pages gets those that are free."""
        if self._short and self.storage.first_pages(request):
            return False
        return self.storage.fits(request) and (not request.grows or self._may_begin(request))

    def _beyond_share(self, request: Request) -> bool:
        """Whether its owner would have too much; nobody has who is alone and has no name."""
        if not request.owner:
            return False
        parts = zip(
            self.waiting.held(request.owner),
            self.storage.needs(request),
            self.storage.free(),
            strict=True,
        )
        return not all(within_share(*part) for part in parts)

    def _start(self, request: Request) -> None:
        self.storage.start(request)
        self.waiting.start(request, self.storage.needs(request))
        request.status = Status.RUNNING
        request.last_step = self._step - 1
        self.running.append(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self._short = self._short and bool(self.running)
        self.waiting.end(request, self.storage.needs(request))
        self.storage.end(request)

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
        uncond = blind = None
        if request.guided:
            uncond = policy.span(request, self.spec, request.uncond_row)
        stores = span.final - span.q_start > max(request.canvas.unit, 1)
        if span.head == Part.NONE:
            return StepEntry(span, uncond, 0, request.params.unmask, stores=stores)
        if request.revokes:
            span, blind = with_blind(span, request.visible, self.spec.logit_shift)
        if request.params.edits:
            span = span._replace(head=Part.OPEN)
            uncond = uncond and uncond._replace(head=Part.OPEN)
        quota = request.quota
        return StepEntry(
            span=span,
            uncond=uncond,
            masks=progress.masks_left,
            rule=request.params.unmask,
            step=progress.step_in_block,
            quota=quota,
            last=request.predictable
            and progress.block == len(request.blocks) - 1
            and progress.masks_left == quota,
            blind=blind,
            stores=stores,
            fills=request.masks[progress.block],
        )


def _known_tokens(requests: Sequence[Request]) -> tuple[NewToken, ...]:
    """Tokens that requests have got without a forward since their last plan."""
    found = []
    for request in requests:
        rows = [request.row, request.uncond_row][: request.rows_needed]
        known = request.unsent.items()
        found += [NewToken(row, p, forced.token) for row in rows for p, forced in known]
        request.unsent = {}
    return tuple(found)


def _packing_order(request: Request, entry: StepEntry) -> tuple[object, ...]:
    """Guided entries last; then like with like, so that kernels see few, large groups."""
    span = entry.span
    shape = (span.q_len, span.ctx_len, span.store, span.q_start, span.keep, span.blk_off)
    return (entry.uncond is not None, entry.blind is not None, *request.kind, shape, request.id)
