"""RowInit: what a rank must know to fill a row of the state table, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from dllmserve._values import SparseConfig
from dllmserve.catalog import CACHES, EDITS, RULES
from dllmserve.core.canvas import Range
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Region, Request
from dllmserve.sampling_params import CONFIDENCE, FLOATS, SamplingParams

#: A larger k filters nothing, but would not fit the table.
_MAX_TOP_K = 2**31 - 1


#: pairs of an integer and a number that a request gives a logit edit
Pairs = tuple[tuple[int, float], ...]


class IntField(IntEnum):
    """Columns of the state table's int64 parameters."""

    #: canvas position of the answer's start
    START = 0
    #: positions from there to the answer's end
    LENGTH = 1
    TOP_K = 2
    SEED = 3
    CONFIDENCE = 4
    TEMPERED = 5
    RANDOM_REMASKING = 6
    RULE = 7
    #: end ids end everything behind them: 1 fills what is masked there, 2 what is written, too
    EARLY_END = 8
    #: a block is final when all of it is written, not position by position
    REVOKES = 9
    TRACK = 10
    #: answer position from which on end ids end the answer
    ENDS_FROM = 11


class Track(IntEnum):
    """What a row's ``StateTable.stale`` holds."""

    NONE = 0
    #: the forward that wrote the position's token
    WRITTEN = 1
    #: how far the position's V moved when it was last computed
    DRIFT = 2


#: by :attr:`dllmserve.catalog.CacheInfo.tracks`
_TRACKS = {"": Track.NONE, "written": Track.WRITTEN, "drift": Track.DRIFT}


@dataclass(frozen=True)
class RowSelect:
    """Selection settings of a row with sparse attention.

    Attributes:
        pool_kernel: width of the max-pooling over neighbouring scores.
        window: tokens from the block's start whose queries score the context and which
            never compete themselves.
        attention: score by attention weights, not by the mean query.
    """

    pool_kernel: int = 1
    window: int = 0
    attention: bool = False


@dataclass(frozen=True)
class RowInit:
    """Initial content of one row.

    Attributes:
        row: row number.
        ids: given tokens, see :class:`dllmserve.core.canvas.Canvas`; on an unconditional row, mask
            ids.
        holes: positions to fill.
        floats, ints: parameters in the order of FLOATS and IntField.
        ends: ids that end the answer.
        confidence: name of the confidence, for the host's choice of statistics.
        sampled, filtered: whether the row has a temperature, or top-p or top-k.
        select: settings of sparse attention.
        edits: the row's logit edits by name, with the pairs of numbers that each of them is given.
        last: token ids whose proposals have no confidence, so that they are written last.
        track: what tells which cached positions are out of date.
        history: slots of kept distributions, one for each position of a block.
        regions: positions whose text has to match a grammar.
        logprobs: of so many of the likeliest tokens log-probabilities are wanted; None: of none,
            and not of those that are written.
        candidates: ids whose log-probabilities are wanted, for each position to fill.
        noise: positions to fill hold noise, and the model is given that in place of a mask.
    """

    row: int
    ids: Sequence[int]
    holes: tuple[Range, ...]
    floats: tuple[float, ...]
    ints: tuple[int, ...]
    ends: tuple[int, ...]
    confidence: str
    sampled: bool
    filtered: bool
    select: RowSelect
    edits: Mapping[str, Pairs] = field(default_factory=dict)
    last: tuple[int, ...] = ()
    track: Track = Track.NONE
    history: tuple[int, ...] = ()
    regions: tuple[Region, ...] = ()
    logprobs: int | None = None
    candidates: tuple[tuple[int, ...], ...] = ()
    noise: bool = False

    @property
    def wants(self) -> bool:
        """True if log-probabilities are wanted."""
        return self.logprobs is not None or bool(self.candidates)

    @property
    def start(self) -> int:
        """Canvas position of the answer's start."""
        return self.holes[0][0]

    @property
    def length(self) -> int:
        """Positions from there to the answer's end."""
        return self.holes[-1][1] - self.start


def ends_of(params: SamplingParams, spec: ModelSpec) -> tuple[int, ...]:
    """Ids that end a request's answer."""
    own = () if params.ignore_eos else spec.eos_ids
    return (*own, *(i for i in params.stop_token_ids or () if i not in own))


def written_last(params: SamplingParams, spec: ModelSpec) -> tuple[int, ...]:
    """Ids whose proposals have no confidence (``confidence_eos_eot_inf``).

    Those that end the text and those that end a turn; with a temperature only the latter, as in
    LLaDA's script: it strikes text ends off a copy that no confidence reads.
    """
    if not params.confidence_eos_eot_inf:
        return ()
    return spec.turn_end_ids if params.temperature > 0 else spec.eos_ids


def bias_of(params: SamplingParams, spec: ModelSpec) -> Pairs:
    """What is added to logits: the request's bias; ids that are out of the question are at -inf."""
    bias = dict(params.logit_bias or {}) | dict.fromkeys(spec.never_ids, -inf)
    if params.logits_eos_inf:
        bias |= dict.fromkeys(spec.text_end_ids, -inf)
    return tuple(bias.items())


def penalty_of(params: SamplingParams, spec: ModelSpec) -> Pairs:
    """What is taken off the logit of the token to the left, with no id; nothing where it is 0."""
    return ((0, params.penalty_lambda),) if params.penalty_lambda > 0 else ()


def edits_of(params: SamplingParams, spec: ModelSpec) -> dict[str, Pairs]:
    """Logit edits that a request asks for, by itself or by its rule, in their order."""
    needs, found = RULES[params.unmask].needs, {}
    for name, info in EDITS.items():
        pairs = info.pairs(params, spec)
        if pairs or name in needs:
            found[name] = pairs
    return found


def _select(sparse: SparseConfig | None) -> RowSelect:
    if sparse is None:
        return RowSelect()
    return RowSelect(sparse.pool_kernel, sparse.default_block_len, sparse.score == "attention")


def row_inits(request: Request, spec: ModelSpec) -> list[RowInit]:
    """The rows of a newly admitted request: one, or two with guidance."""
    params, track = request.params, _TRACKS[CACHES[request.policy].tracks]
    numbers = (getattr(params, name) for name in FLOATS)
    floats = tuple(inf if number is None else float(number) for number in numbers)
    ints = (
        request.canvas.start,
        request.canvas.end - request.canvas.start,
        min(params.top_k, _MAX_TOP_K),
        request.seed,
        CONFIDENCE.index(params.confidence),
        int(params.schedule == "dream"),
        int(params.remasking == "random"),
        RULES.index(params.unmask),
        int(params.early_end) + int(params.end_padding),
        int(request.revokes),
        int(track),
        request.ends_from,
    )
    given = request.canvas.ids
    edits = edits_of(params, spec)
    if request.regions:
        edits["constraint"] = ()
    rows = [(request.row, given, edits)]
    if request.guided:
        rows.append((request.uncond_row, [spec.mask_id] * len(given), {}))
    return [
        RowInit(
            row=row,
            ids=ids,
            holes=request.canvas.holes,
            floats=floats,
            ints=ints,
            ends=ends_of(params, spec),
            confidence=params.confidence,
            sampled=params.temperature > 0,
            filtered=params.top_p < 1 or params.top_k > 0,
            select=_select(request.sparse),
            edits=edits,
            last=written_last(params, spec),
            track=track,
            history=tuple(request.history),
            regions=request.regions if row == request.row else (),
            logprobs=params.logprobs,
            candidates=request.candidates if row == request.row else (),
            noise=spec.noise,
        )
        for row, ids, edits in rows
    ]
