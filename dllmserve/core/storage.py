"""Storage: the rows, pages and kept distributions that running requests hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.pages import PageAllocator
from dllmserve.core.plan import NewPage, Span, Store
from dllmserve.core.prefix import PageNames, Prefix
from dllmserve.core.request import Request


class SpanSource(Protocol):
    """The part of a cache policy that the scheduler uses."""

    def slots(self, request: Request, spec: ModelSpec) -> int:
        """K,V slots that one row needs at most."""
        ...

    def span(self, request: Request, spec: ModelSpec, row: int) -> Span:
        """The request's next span."""
        ...


class Storage:
    """What is free, and who holds the rest.

    A request holds all pages that it will ever need from its start on, unless its cache policy
    grows: then it starts with those of its given tokens, gets more when it stores more, and may be
    told to give all of them back. Pages that hold what a request would store next are shared with
    it, where its geometry allows that.

    Args:
        spec: the model's dimensions.
        limits: the engine's sizes.
        policy: maps a policy name to its policy.

    Attributes:
        pages: of the K,V store.
        history: kept distributions.
        rows: free rows of the state table.
        preempted: times that pages were taken from a running request.
        prompts, cached: given tokens of requests that may share pages, and those of them whose K
            and V were found there.
    """

    def __init__(
        self, spec: ModelSpec, limits: Limits, policy: Callable[[str], SpanSource]
    ) -> None:
        self.pages = PageAllocator(limits.num_pages)
        self.history = PageAllocator(limits.max_history_rows)
        self.rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.preempted = self.prompts = self.cached = 0
        self._spec, self._limits, self._policy = spec, limits, policy

    def most_pages(self, request: Request) -> int:
        """Pages that one row of the request needs at most."""
        return self._limits.pages_of(self._policy(request.policy).slots(request, self._spec))

    def first_pages(self, request: Request) -> int:
        """Pages that one row of the request starts with, or comes back with if it lost them."""
        if not request.grows:
            return self.most_pages(request)
        block = min(request.progress.block, len(request.blocks) - 1)
        return self._limits.pages_of(request.blocks[block][0])

    def begins_with(self, request: Request) -> int:
        """Free pages that it takes for that: those that others hold, too, need no place."""
        pages = self.first_pages(request) * request.rows_needed
        return pages - sum(self.pages.holders(page) > 0 for page in self._found(request))

    def needs(self, request: Request) -> tuple[int, ...]:
        """Rows, pages and kept distributions that the request holds at most."""
        pages = self.most_pages(request) * request.rows_needed
        return request.rows_needed, pages, request.history_needed

    def free(self) -> tuple[int, ...]:
        """The same, of what nobody holds."""
        return len(self.rows), self.pages.num_free, self.history.num_free

    def fits(self, request: Request) -> bool:
        """Whether the request can start."""
        needs = request.rows_needed, self.begins_with(request), request.history_needed
        return all(n <= f for n, f in zip(needs, self.free(), strict=True))

    def start(self, request: Request) -> None:
        """Give a request its rows and the pages that it starts with."""
        pages = self.first_pages(request)
        request.row = self.rows.pop()
        self.prompts += request.prompt_len if request.prefix else 0
        self.adopt(request)
        request.pages += self.pages.reserve(pages - len(request.pages))
        request.history = self.history.reserve(request.history_needed)
        if request.guided:
            request.uncond_row = self.rows.pop()
            request.uncond_pages = self.pages.reserve(pages)

    def end(self, request: Request) -> None:
        """Take back all that a request holds."""
        self.rows.append(request.row)
        if request.guided:
            self.rows.append(request.uncond_row)
        self.history.free(request.history)
        request.history = []
        self.take_pages(request)

    def take_pages(self, request: Request) -> None:
        """Take back a request's pages; what it stored has to be computed anew, or found."""
        # a page is of use to others only with those before it, so it is to be reused before them
        self.pages.free(reversed(request.pages))
        self.pages.free(request.uncond_pages)
        request.pages, request.uncond_pages, request.sent = [], [], 0
        request.progress.stored = 0
        if request.prefix is not None:
            request.prefix.named = 0

    def prefix_of(self, request: Request) -> Prefix | None:
        """What a request may share of its pages; None if that is nothing."""
        canvas, size = request.canvas, self._limits.page_size
        if not canvas.window or request.guided or not self._limits.prefix_caching:
            return None
        salt = request.owner if self._limits.prefix_isolation else ""
        names = PageNames(size, canvas.window, salt)
        names.learn(canvas.ids[: canvas.start])
        first = request.blocks[0][0] // canvas.window * canvas.window
        # what is read at the position before the answer has to be computed
        return Prefix(names, min(first, canvas.start - canvas.shift) // size)

    def adopt(self, request: Request) -> bool:
        """Take over pages that hold what a request is to store next; False if there are none."""
        prefix, pages = request.prefix, request.pages
        found = self._found(request)
        if prefix is None or not found:
            return False
        self.pages.share(found)
        size = self._limits.page_size
        column = request.progress.stored // size
        own = pages[column : column + len(found)]  # of which the first may be half full already
        self.pages.free(own)
        pages[column : column + len(found)] = found
        request.sent = min(request.sent, column)
        gained = (column + len(found)) * size - request.progress.stored
        request.progress.stored += gained
        prefix.named = max(prefix.named, column + len(found))
        if not request.preempted:
            prefix.cached += gained
            self.cached += gained
        return True

    def publish(self, request: Request) -> None:
        """Let others find the full pages that a request has stored and whose tokens are known."""
        prefix = request.prefix
        if prefix is None:
            return
        stored = request.progress.stored // self._limits.page_size
        for column in range(prefix.named, min(stored, len(prefix.names))):
            self.pages.name(request.pages[column], prefix.names[column])
            prefix.named = column + 1

    def next_names(self, request: Request, final: int) -> list[bytes]:
        """Names of the pages that a request fills, and others may share, up to ``final``."""
        if request.prefix is None:
            return []
        size, names = self._limits.page_size, request.prefix.names
        last = min(final // size, request.prefix.end)
        return [names[page] for page in range(request.progress.stored // size, last)]

    def _found(self, request: Request) -> list[int]:
        """Pages, in order, that hold what a request is to store next."""
        found = list[int]()
        if request.prefix is None:
            return found
        for index in range(request.progress.stored // self._limits.page_size, request.prefix.end):
            page = self.pages.find(request.prefix.names[index])
            if page is None:
                break
            found.append(page)
        experts = self._spec.experts
        if experts is not None and experts.capacity:
            # what a position computes depends on its whole window, so that is computed as a whole
            first = request.progress.stored // self._limits.page_size
            while found and (first + len(found)) * self._limits.page_size % request.canvas.window:
                found.pop()
        return found

    def missing(self, request: Request, span: Span) -> int:
        """Pages that each row of a request lacks for what a span stores."""
        stores = span.store in (Store.POSITIONS, Store.AHEAD)
        end = span.q_start + span.reach if stores else 0
        return max(self._limits.pages_of(end) - len(request.pages), 0)

    def grow(self, request: Request, missing: int, victims: Iterable[Request]) -> bool:
        """Give a request the pages that it lacks; False if there is no room for them.

        Args:
            request: one that grows.
            missing: pages that each of its rows lacks.
            victims: running requests whose pages may be taken for it, the first first.
        """
        taken = self.to_take(missing * request.rows_needed, victims)
        if taken is None:
            return False
        for victim in taken:
            self.preempted += bool(victim.pages)
            victim.preempted += bool(victim.pages)
            self.take_pages(victim)
        request.pages += self.pages.reserve(missing)
        if request.guided:
            request.uncond_pages += self.pages.reserve(missing)
        return True

    def to_take(self, pages: int, victims: Iterable[Request]) -> list[Request] | None:
        """Whose pages have to be taken so that so many are free; None if there are too few."""
        short, taken = pages - self.pages.num_free, list[Request]()
        let_go = Counter[int]()
        for victim in victims if short > 0 else ():
            taken.append(victim)
            for page in (*victim.pages, *victim.uncond_pages):
                let_go[page] += 1
                short -= let_go[page] == self.pages.holders(page)  # nobody else has it
            if short <= 0:
                break
        return taken if short <= 0 else None

    def check_integrity(self, running: list[Request]) -> None:
        """Raise ValueError unless rows and pages add up."""
        self.pages.check_integrity()
        self.history.check_integrity()
        rows = sum(r.rows_needed for r in running) + len(self.rows)
        if rows != self._limits.max_num_seqs:
            raise ValueError(f"{rows} rows held and free, expected {self._limits.max_num_seqs}")
        held = sum(len(r.pages) + len(r.uncond_pages) for r in running) + self.pages.num_free
        if held < self.pages.num_pages:
            raise ValueError(f"{held} pages held and free, of {self.pages.num_pages}")


def new_pages(requests: Iterable[Request]) -> tuple[NewPage, ...]:
    """Pages that requests have got since this was last asked; they count as sent then."""
    found = []
    for request in requests:
        for column in range(request.sent, len(request.pages)):
            found.append(NewPage(request.row, column, request.pages[column]))
            if request.guided:
                found.append(NewPage(request.uncond_row, column, request.uncond_pages[column]))
        request.sent = len(request.pages)
    return tuple(found)
