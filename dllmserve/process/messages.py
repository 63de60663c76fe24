"""Messages between workers and their owner: typed structs, encoded as msgpack.

Nothing that crosses the socket is ever executed or unpickled: a message that does not fit
its type is an error.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec

from dllmserve.constraints.compiled import Compiled
from dllmserve.core.canvas import Canvas as Layout
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepPlan
from dllmserve.core.rows import RowInit
from dllmserve.holes import Holes
from dllmserve.outputs import CanvasStep, RequestOutput, TokenLogprob
from dllmserve.sampling_params import SamplingParams

#: a field of EngineConfig
Value = bool | int | float | str | list[int] | None


class Configure(msgspec.Struct, tag="configure", array_like=True, frozen=True):
    """First message to an engine: the fields of its EngineConfig."""

    options: dict[str, Value]


class Join(msgspec.Struct, tag="join", array_like=True, frozen=True):
    """First message to a rank of an engine.

    Attributes:
        options: the fields of its EngineConfig.
        rank, size: this rank, of so many.
        port: of the store where the ranks find each other.
    """

    options: dict[str, Value]
    rank: int
    size: int
    port: int


class Admit(msgspec.Struct, tag="admit", array_like=True, frozen=True):
    """Fill a row of a rank's state table."""

    row: RowInit


class Execute(msgspec.Struct, tag="execute", array_like=True, frozen=True):
    """Run a step on a rank."""

    plan: StepPlan


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """Run a request.

    Attributes:
        prompt_ids: token ids; of a whole row, if it has holes.
        params: how it is decoded.
        stream: report committed ids as they come.
        watch: report a canvas after every step.
        owner, candidates, trace, holes, grammars: as
            :class:`dllmserve.core.request.Request` says.
        canvas: what is filled, if it is neither holes nor an answer behind a prompt; without its
            ids, which are the prompt_ids.
        id: unique in the process that made the message, so that a request can move to another
            engine.
    """

    prompt_ids: list[int]
    params: SamplingParams
    stream: bool = False
    watch: bool = False
    owner: str = ""
    candidates: tuple[tuple[int, ...], ...] = ()
    trace: bool = False
    holes: Holes = ()
    grammars: tuple[Compiled | None, ...] = ()
    canvas: Layout | None = None
    id: int = msgspec.field(default_factory=itertools.count().__next__)


class Abort(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Drop requests; those that have ended are left alone."""

    ids: list[int]


class Stop(msgspec.Struct, tag="stop", array_like=True, frozen=True):
    """End at once. A rank first runs the steps that were sent before this message."""


ToWorker = Configure | Join | Submit | Abort | Admit | Execute | Stop


class EngineInfo(msgspec.Struct, frozen=True):
    """A loaded engine.

    Attributes:
        directory: of the checkpoint.
        spec, limits: the model's dimensions and the engine's sizes.
        device, dtype, memory: as text, for people.
    """

    directory: str
    spec: ModelSpec
    limits: Limits
    device: str
    dtype: str
    memory: str


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The model is loaded."""

    info: EngineInfo


class NotLoaded(msgspec.Struct, tag="not_loaded", array_like=True, frozen=True):
    """The model cannot be loaded.

    Attributes:
        error: name of a class in dllmserve.errors.
        message: its text.
        stopped: the reason is a signal that has stopped a rank, and nothing in the model.
    """

    error: str
    message: str
    stopped: bool = False


class Admitted(msgspec.Struct, tag="admitted", array_like=True, frozen=True):
    """Requests that the coming step runs for the first time. Sent before it is launched."""

    ids: list[int]


class Committed(msgspec.Struct, array_like=True, frozen=True):
    """Ids that joined a streamed request's committed prefix, and their log-probabilities."""

    id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None


class Canvas(msgspec.Struct, array_like=True, frozen=True):
    """A watched request's answer after a step; ``step.output`` is None in it."""

    id: int
    step: CanvasStep


class Finished(msgspec.Struct, array_like=True, frozen=True):
    """A request that has ended well."""

    id: int
    output: RequestOutput


class Failed(msgspec.Struct, array_like=True, frozen=True):
    """A request that has ended with an error, a class of dllmserve.errors."""

    id: int
    error: str
    message: str


class Counters(msgspec.Struct, array_like=True, frozen=True):
    """The engine's state in numbers. All but the gauges count from the engine's start.

    Attributes:
        waiting, running: requests (gauges).
        pages_used: share of the K,V pages in use, 0 to 1 (gauge).
        steps: forward passes.
        spans: requests of which they decided tokens, summed.
        positions: positions of active blocks in them, summed.
        committed: positions that joined a committed prefix.
        busy: seconds with a request under way.
        preempted: times that a request gave its pages to an older one.
        prompts, cached: tokens of prompts that were started, and those of them whose K and V were
            found in pages.
    """

    waiting: int = 0
    running: int = 0
    pages_used: float = 0.0
    steps: int = 0
    spans: int = 0
    positions: int = 0
    committed: int = 0
    busy: float = 0.0
    preempted: int = 0
    prompts: int = 0
    cached: int = 0


def added(*parts: Counters) -> Counters:
    """Counters added up, each with its like."""
    return Counters(*map(sum, zip(*map(msgspec.structs.astuple, parts), strict=True)))


class Report(msgspec.Struct, tag="report", array_like=True, frozen=True):
    """What an engine's step has produced. Without requests it is a heartbeat."""

    counters: Counters
    committed: list[Committed] = []
    canvases: list[Canvas] = []
    finished: list[Finished] = []
    failed: list[Failed] = []


class Crashed(msgspec.Struct, tag="crashed", array_like=True, frozen=True):
    """The last message of a worker that raised; ``killed``: the reason came from outside."""

    message: str
    killed: bool = False


class Reached(msgspec.Struct, tag="reached", array_like=True, frozen=True):
    """A rank has reached a stage: it has imported torch ("started") or its weights ("loaded")."""

    stage: Literal["started", "loaded"]


class Heartbeat(msgspec.Struct, tag="heartbeat", array_like=True, frozen=True):
    """A rank is alive. An engine's heartbeats are its :class:`Report` messages."""


FromWorker = Ready | NotLoaded | Admitted | Report | Crashed | Reached | Heartbeat


def plain(value: Any) -> int | float | str | bytes:
    """A subclass of int, float or str, such as Kept, as a plain one, and grammars as bytes."""
    if isinstance(value, Compiled):
        return value.data
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} is not for messages")


def _known(kind: type[Any], value: Any) -> Any:
    """A grammar that has travelled; nothing else needs help."""
    if kind is Compiled and isinstance(value, bytes):
        return Compiled.of_bytes(value)
    raise NotImplementedError(f"{kind.__name__} is not for messages")


_encoder = msgspec.msgpack.Encoder(enc_hook=plain)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_known)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    """A message to a worker. Raises msgspec.ValidationError if the bytes are no message."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """A message of a worker. Raises msgspec.ValidationError if the bytes are no message."""
    return _from_worker.decode(data)
