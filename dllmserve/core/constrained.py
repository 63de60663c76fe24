"""What constraints make of a request's progress: slots that can hold one token need no forward.

The device works out which slots of a constrained request can hold one token alone. The host writes
them, as the request's rule would have done in a forward, and goes on to the next slot that is open.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dllmserve._combinations import editing
from dllmserve.catalog import RULES
from dllmserve.constraints.compiled import Compiled
from dllmserve.core.plan import OPEN, WRITTEN, EntryReport
from dllmserve.core.request import Forced, Region, Request
from dllmserve.errors import InvalidParameterError

#: holes of a request that may have a constraint
MAX_REGIONS = 16
#: states times slots up to which it is worked out on the host what a new request has to hold
_MOST_CELLS = 1 << 18


def settle(request: Request, report: EntryReport, ends: Collection[int]) -> EntryReport:
    """Write what needs no forward, and report what then stands.

    Args:
        request: its progress is that after the report.
        report: with ``holds``.
        ends: ids that end the request's answer.
    """
    if report.holds is None:
        return report
    holds, canvas, progress = report.holds, request.canvas, request.progress
    if request.revokes:
        _forget_taken_back(request, holds, ends)
    write_forced(request, holds, ends)
    length = min(len(holds), canvas.answer_len)
    frontier = progress.frontier
    while frontier < length and not _is_open(request, holds, canvas.start + frontier):
        frontier += 1
    if request.revokes and not request.launched and progress.masks_left:
        frontier = min(frontier, max(request.blocks[progress.block][0] - canvas.start, 0))
    found = (report.end, request.forced_end)
    end = min((place for place in found if 0 <= place < length), default=-1)
    return report._replace(frontier=frontier, end=end, eos=end if end < frontier else -1)


def _forget_taken_back(request: Request, holds: Sequence[int], ends: Collection[int]) -> None:
    """Forget tokens of the host's that the rule has masked again."""
    start = request.canvas.start
    kept = {p: it for p, it in request.forced.items() if holds[p - start] == WRITTEN}
    request.forced = kept
    own = (p - start for p, it in kept.items() if it.token in ends)
    request.forced_end = min((i for i in own if i >= request.ends_from), default=-1)


def _is_open(request: Request, holds: Sequence[int], position: int) -> bool:
    """Whether nothing stands at a canvas position yet."""
    return holds[position - request.canvas.start] != WRITTEN and position not in request.forced


def write_forced(request: Request, holds: Sequence[int], ends: Collection[int]) -> None:
    """Write slots of the active block that can hold one token, and go on while a block is full.

    Args:
        request: it stands before a forward.
        holds: of each position of the answer, see :class:`dllmserve.core.plan.EntryReport`.
        ends: ids that end the answer.
    """
    start, progress = request.canvas.start, request.progress
    while not request.launched:
        block = range(*request.blocks[progress.block])
        # a block may hold given tokens before the answer's start and behind its end
        inside = range(max(block.start, start), min(block.stop, start + len(holds)))
        left = [p for p in inside if _is_open(request, holds, p)]
        if progress.step_in_block == 0 and progress.scheduled == 0:
            request.begin_block(len(left))
        progress.masks_left = len(left)
        if not left:
            request.leave_block()
            continue
        known = {p: holds[p - start] for p in left}
        written = _needs_no_forward(request, left, known, ends)
        if not written:
            return
        if RULES[request.params.unmask].quota == "exact":
            request.foreseen.append(progress.forwards)
            progress.scheduled += 1
        step = max(progress.forwards + len(request.foreseen), 1)
        for position in written:
            forced = Forced(known[position], step)
            request.forced[position] = request.unsent[position] = forced
            if forced.token in ends and position - start >= request.ends_from:
                before = request.forced_end
                request.forced_end = min(before if before >= 0 else len(holds), position - start)


def _needs_no_forward(
    request: Request, left: list[int], open_: Mapping[int, int], ends: Collection[int]
) -> list[int]:
    """Open positions of the block that the next forward would write, whatever the model says.

    Rules without a fixed quota write all that can hold one token. With one, a forward is known
    beforehand if it would write nothing else: such tokens are certain, so they come first.
    """
    params = request.params
    if params.remasking == "random":
        return []  # noise says where the forward writes
    known = [p for p in left if open_[p] != OPEN]
    if params.confidence_eos_eot_inf:  # then ends come last
        known = [p for p in known if open_[p] not in ends]
    if RULES[params.unmask].quota != "exact":
        return known
    if params.unmask == "sequential":
        known = [p for p in left[: request.quota] if open_[p] != OPEN]
    return known[: request.quota] if len(known) >= request.quota else []


def regions_of(request: Request, grammars: Sequence[Compiled | None]) -> tuple[Region, ...]:
    """Where what a request's texts have to match is.

    Args:
        request: it has no regions yet.
        grammars: of the answer, or one for each hole of a template, None for one that may hold
            anything; none at all: the same.

    Raises:
        InvalidParameterError: no text that matches fits into a hole, or its tokens could change.
    """
    if not grammars:
        return ()
    canvas, regions = request.canvas, []
    spans = [(start, start + hole.length) for start, hole in request.holes]
    spans = spans or [(canvas.start, canvas.start + canvas.answer_len)]
    params, way = request.params, "the answer end (ignore_eos=False)"
    name, asked = params.length_name, "json_schema" if params.json_schema is not None else "regex"
    asked = "choice" if params.choice is not None else asked
    for place, ((start, end), grammar) in enumerate(zip(spans, grammars, strict=True)):
        if request.holes:
            name, way = f"the length of hole {place}", "the hole end (fill='up_to')"
        if grammar is not None:
            if request.holes:
                asked = f"{request.holes[place][1].constraints[0]} of hole {place}"
            regions.append(Region(start, end, grammar))
            _check_room(regions[-1], asked, name, way)
    check_count(len(regions))
    if regions and params.end_padding:
        raise InvalidParameterError(
            "end_padding=True writes over what stands behind an end id, and does not work with "
            "what has to match something: leave one of them out"
        )
    if regions and params.edits:
        raise InvalidParameterError(
            f"{editing(params)} does not work with what has to match something, whose tokens are "
            "written for good: leave one of them out"
        )
    return tuple(regions)


def check_count(regions: int) -> None:
    """Raise InvalidParameterError if a request has more than it may have."""
    if regions > MAX_REGIONS:
        raise InvalidParameterError(
            f"{regions} holes have a constraint, and a request may have {MAX_REGIONS}: "
            "make it several requests"
        )


def _check_room(region: Region, asked: str, name: str, way: str) -> None:
    from dllmserve.constraints.sets import RegionSets, may_end_early, moves_of

    grammar, slots = region.grammar, region.end - region.start
    least = int(grammar.least[grammar.start])
    if least > slots:
        raise InvalidParameterError(
            f"{asked} matches no text of fewer than {least} tokens, and {name} is {slots}: raise "
            f"it to {least} or more"
        )
    if not may_end_early(grammar) and not RegionSets(moves_of(grammar), slots).feasible:
        raise InvalidParameterError(
            f"{asked} matches no text of exactly {slots} tokens, which {name} asks for (the "
            f"shortest has {least}): take another length, or let {way}"
        )


def begin(request: Request, ends: Collection[int]) -> None:
    """Write what a new request's constraints leave no choice about.

    Args:
        request: not queued yet.
        ends: ids that end its answer.
    """
    if not request.regions:
        return
    from dllmserve.constraints.sets import RegionSets, moves_of

    canvas = request.canvas
    holds = [WRITTEN] * (canvas.end - canvas.start)
    for start, end in canvas.holes:
        holds[start - canvas.start : end - canvas.start] = [OPEN] * (end - start)
    for region in request.regions:
        slots = region.end - region.start
        if len(region.grammar.delta) * slots > _MOST_CELLS:
            continue  # the first forward will tell
        sets = RegionSets(moves_of(region.grammar), slots)
        for slot, token in sets.forced(range(slots)).items():
            holds[region.start + slot - canvas.start] = token
    write_forced(request, holds, ends)
