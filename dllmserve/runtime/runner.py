"""ModelRunner: executes a plan on one device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from dllmserve.attention.backend import AttentionBackend, AttentionStep, KVStore
from dllmserve.catalog import RULES, Made
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import EntryReport, Part, StepEntry, StepPlan
from dllmserve.core.rows import RowInit, Track
from dllmserve.decoding.logprobs import Wanted
from dllmserve.decoding.rule import RuleView, UnmaskRule, Update
from dllmserve.decoding.stats import TokenStats
from dllmserve.device import host_to_device
from dllmserve.models.decoder import Decoder
from dllmserve.runtime.edits import LogitEdit, with_left
from dllmserve.runtime.inputs import span_fields
from dllmserve.runtime.logits import LogitsHead, StepEdits
from dllmserve.runtime.logprobs import LogprobReport, candidate_ids, tokens_of
from dllmserve.runtime.platform import (
    host_room,
    is_out_of_memory,
    own_types,
    record_event,
    release_cached_memory,
    to_host,
)
from dllmserve.runtime.shape import (
    COARSE,
    ENTRY_FIELDS,
    EXACT,
    LADDER,
    SPAN_FIELDS,
    Packing,
    Padding,
    StepShape,
    empty_ints,
    lay_out,
)
from dllmserve.runtime.state_table import StateTable
from dllmserve.runtime.step import StepOps, StepWork, TorchStep
from dllmserve.runtime.tensors import REPORT_FIELDS, StepOutputs

if TYPE_CHECKING:
    from dllmserve.runtime.constraints import ConstraintEdit
    from dllmserve.runtime.graphs import GraphPool

#: Larger steps keep the device busy without a graph, and a graph for them would take much memory.
MAX_GRAPH_TOKENS = 4096
#: The same of steps that store prompts: they come in more sizes, and above this many tokens the
#: device takes as long as the host.
MAX_STORING_GRAPH_TOKENS = 512
#: statistics that a confidence is made of, besides the probability
_CONFIDENCE_NEEDS = {"margin": frozenset({"margin"}), "neg_entropy": frozenset({"entropy"})}
#: what keeping track of out-of-date positions takes
_TRACK_NEEDS = {
    Track.NONE: frozenset[str](),
    Track.WRITTEN: frozenset({"track"}),
    Track.DRIFT: frozenset({"track", "drift"}),
}

_MEMORY, _REPLACE = frozenset({"memory"}), frozenset({"replace"})


class StepHandle:
    """A step in flight. ``result()`` is the only place where the host waits.

    It is made before the step is launched, so that no memory is missing afterwards.

    Args:
        plan: the step's.
        packing: how it is laid out.
        table: state rows.

    Attributes:
        proposals: what the model proposed, [n, W] on the device; read it before the next
            step is launched.
        blocks: canvas start and length of each entry's block.
        await_event: how to wait for the device.
    """

    proposals: StepOutputs

    def __init__(self, plan: StepPlan, packing: Packing, table: StateTable) -> None:
        self.blocks = [(e.span.blk_start, e.span.blk_len) for e in plan.entries]
        self.await_event: Callable[[torch.cuda.Event], None] = _synchronize
        self._indices = packing.indices[: len(plan.entries)]
        self._table = table
        size = packing.shape.entries, REPORT_FIELDS
        like = torch.empty(size, dtype=torch.int64, device="meta")
        self._report_room = host_room(like, table.device)
        self._holds_room: Tensor | None = None
        if packing.shape.constrained:
            like = torch.empty(
                packing.shape.entries, packing.shape.answer, dtype=torch.int64, device="meta"
            )
            self._holds_room = host_room(like, table.device)
        self._holds: Tensor | None = None
        self._constrained = [
            bool(e.span.blk_len and table.host[e.span.row].regions) for e in plan.entries
        ]
        ending = [e.span.row for e in plan.entries if e.last]
        self._rooms = {
            row: [host_room(like, table.device) for like in self._read(row)] for row in ending
        }
        self._logprobs = LogprobReport(packing, table.device)
        self._answers: dict[int, list[Tensor]] = {}
        self._event: torch.cuda.Event | None = None

    def launched(self, outputs: StepOutputs) -> None:
        """Start the copies to the host of what a step leaves."""
        self.proposals, table = outputs, self._table
        self._report = to_host(outputs.report, self._report_room)
        if outputs.holds is not None:
            self._holds = to_host(outputs.holds, self._holds_room)
        for row, rooms in self._rooms.items():
            pairs = zip(self._read(row), rooms, strict=True)
            self._answers[row] = [to_host(values, room) for values, room in pairs]
        self._logprobs.launched(outputs)
        self._event = record_event(table.device)  # behind all that the host will wait for

    def proposed(self, entry: int) -> tuple[list[int], list[float]]:
        """Tokens and confidences of the positions of an entry's block, -inf where there is none."""
        index, (_, width) = self._indices[entry], self.blocks[entry]
        found = self.proposals
        return found.tokens[index, :width].tolist(), found.confidence[index, :width].tolist()

    def edited(self, entry: int) -> list[int]:
        """Positions of an entry's block whose written token was replaced."""
        edits = self.proposals.edits
        if edits is None:
            return []
        return edits[self._indices[entry], : self.blocks[entry][1]].nonzero()[:, 0].tolist()

    def keep_proposals(self) -> None:
        """Copy the proposals, which the next replay of the same graph would overwrite.

        To the host, since the device has no memory left; the host waits for it.
        """
        found = self.proposals
        self.proposals = replace(
            found,
            tokens=found.tokens.cpu(),
            confidence=found.confidence.cpu(),
            edits=None if found.edits is None else found.edits.cpu(),
        )

    def result(self) -> list[EntryReport]:
        """Wait for the device and return one report per entry."""
        self._wait()
        rows = self._report.tolist()
        reports = [EntryReport(*rows[index]) for index in self._indices]
        if self._holds is None:
            return reports
        entries = zip(reports, self._indices, self._constrained, strict=True)
        return [
            report._replace(holds=self._holds[index].tolist()) if own else report
            for report, index, own in entries
        ]

    def logprobs(self, entry: int) -> tuple[Tensor, Tensor, Wanted] | None:
        """See :meth:`LogprobReport.of`; after :meth:`result`."""
        return self._logprobs.of(self._indices[entry])

    def answer(self, row: int, count: int) -> tuple[list[int], list[int]] | None:
        """The first ``count`` answer ids of a row whose last step this was, else None.

        With them come the forwards that wrote them.
        """
        if row not in self._answers:
            return None
        self._wait()
        ids, steps = (values[:count].tolist() for values in self._answers[row])
        return ids, steps

    def _read(self, row: int) -> tuple[Tensor, Tensor]:
        """What is read of a row at its request's end: ids and the forwards that wrote them."""
        return self._table.answer(row), self._table.answer_steps(row)

    def _wait(self) -> None:
        if self._event is not None:
            self.await_event(self._event)


def _synchronize(event: torch.cuda.Event) -> None:
    event.synchronize()


class StepRunner(Protocol):
    """What an engine steps with: a model on one device, or on several."""

    #: whether a step that ran out of memory can be run again
    recovers: bool

    @property
    def spec(self) -> ModelSpec:
        """The whole model."""
        ...

    @property
    def table(self) -> StateTable:
        """State rows, of this process's device."""
        ...

    def admit(self, init: RowInit) -> None:
        """Fill a row of the state table, and what its logit edits keep."""
        ...

    def execute(self, plan: StepPlan) -> StepHandle:
        """Run one step."""
        ...

    def close(self) -> None:
        """Let go of what the runner holds beside memory."""
        ...


def _step_ops(
    kernels: str, table: StateTable, rules: Mapping[str, UnmaskRule], spec: ModelSpec
) -> StepOps:
    """The twin that ``kernels`` names: "torch" or "triton"."""
    if kernels == "triton":
        from dllmserve.runtime.kernels.step import TritonStep

        return TritonStep(table, rules, spec)
    return TorchStep(table, rules, spec)


class ModelRunner:
    """Model, state, K,V pages and LM head of one device.

    Args:
        decoder: the loaded model.
        table: state rows.
        kv: K,V pages.
        backend: attention.
        head: LM head.
        graphs: CUDA graphs, or None to launch every kernel by itself.
        kernels: "torch" or "triton": what reads and writes the state rows.
        edits: logit edits by name; without a rule's the engine takes none of its requests.
    """

    recovers = True

    def __init__(
        self,
        decoder: Decoder,
        table: StateTable,
        kv: KVStore,
        backend: AttentionBackend,
        head: LogitsHead,
        graphs: GraphPool | None = None,
        *,
        kernels: str = "torch",
        edits: Mapping[str, LogitEdit] | None = None,
    ) -> None:
        self._spec = decoder.spec
        self._table = table
        self.kv = kv
        waits = decoder.spec.experts is not None and decoder.ops.asks_for_experts
        captures = backend.graphs and decoder.group.captures and not waits
        self.graphs = graphs if captures else None
        self._decoder = decoder
        self._backend = backend
        self._head = head
        self._edits = edits or {}
        if "constraint" in self._edits and self.graphs is not None:
            constraint: Any = self._edits["constraint"]
            constraint.on_growth = self.graphs.clear
        self._ops = _step_ops(kernels, table, Made(RULES), decoder.spec)
        # padding at most doubles the number of spans
        capacity = (4 * table.trash_row + 64) * (SPAN_FIELDS + ENTRY_FIELDS)
        self._packed = torch.zeros(capacity, dtype=torch.int32, device=table.device)

    @property
    def keeping(self) -> tuple[str, ...]:
        """Rules that keep something of logits."""
        return tuple(n for n, rule in RULES.items() if rule.keeps and rule.needs & {*self._edits})

    @property
    def spec(self) -> ModelSpec:
        """The whole model."""
        return self._spec

    @property
    def table(self) -> StateTable:
        """State rows."""
        return self._table

    def close(self) -> None:
        """Nothing but memory is held."""

    @property
    def logit_bytes(self) -> int:
        """Bytes of the shared logits buffer; 0 where logits are allocated step by step."""
        return self._head.buffer_bytes

    @torch.inference_mode()  # the table may have been made in this mode
    def admit(self, init: RowInit) -> None:
        """Fill a row of the state table, and what its logit edits keep."""
        self.table.write_row(init)
        # the row's last request may have been constrained, so that has to hear of every one
        for name in {**init.edits, "constraint": ()} if "constraint" in self._edits else init.edits:
            self._edits[name].admit(init)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepHandle:
        """Run one step: forward, statistics, rules, report. Does not wait for the device."""
        self._turn_pages(plan)
        packing, graphs = self._pack(plan)
        handle = StepHandle(plan, packing, self.table)
        with own_types(self.table.device):
            handle.launched(self._run(plan, packing, graphs))
        return handle

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Run one step whose report another rank reads."""
        self._turn_pages(plan)
        self._run(plan, *self._pack(plan))

    def _turn_pages(self, plan: StepPlan) -> None:
        """Note the pages and the tokens that rows have got."""
        if plan.tokens_known:
            device = self.table.device
            known = zip(*plan.tokens_known, strict=True)
            rows, positions, tokens = (host_to_device(n, device) for n in known)
            self.table.tokens[rows, positions] = tokens
            self.table.masked[rows, positions] = False
        if plan.pages:
            device = self.table.device
            rows, columns, pages = (
                host_to_device(n, device) for n in zip(*plan.pages, strict=True)
            )
            self.kv.page_table[rows, columns] = pages

    def _pack(self, plan: StepPlan) -> tuple[Packing, GraphPool | None]:
        """How a plan is laid out, and the graphs that run it; None for kernel by kernel."""
        storing = any(entry.stores for entry in plan.entries)
        if self._graphable(plan, MAX_STORING_GRAPH_TOKENS if storing else MAX_GRAPH_TOKENS):
            packing = self._lay_out(plan, COARSE if storing else LADDER)
            if self.graphs is not None and self.graphs.wanted(packing.shape):
                return packing, self.graphs
        return self._lay_out(plan, EXACT), None

    def _run(self, plan: StepPlan, packing: Packing, graphs: GraphPool | None) -> StepOutputs:
        if graphs is not None:
            return self._replay(graphs, plan, packing)
        self._upload(packing.ints)
        return self._step(plan, packing)

    def _graphable(self, plan: StepPlan, most: int) -> bool:
        """True if the plan is small and no span is a refresh: sizes then come back."""
        return (
            self.graphs is not None
            and plan.tokens <= most
            and not any(s.refresh or s.selects for s in plan.spans)
            and not any(entry.span.row in self.table.candidates for entry in plan.entries)
        )

    def _lay_out(self, plan: StepPlan, pad: Padding) -> Packing:
        return lay_out(plan, self.table.host, self._needs, self.table.trash_row, pad)

    def _needs(self, entry: StepEntry) -> frozenset[str]:
        init = self.table.host[entry.span.row]
        rule = RULES[entry.rule]
        wanted = rule.needs | _CONFIDENCE_NEEDS.get(init.confidence, frozenset())
        if entry.span.head == Part.OPEN:
            wanted |= _REPLACE
        return wanted | _TRACK_NEEDS[init.track] | (_MEMORY if rule.memory else frozenset())

    def _replay(self, graphs: GraphPool, plan: StepPlan, packing: Packing) -> StepOutputs:
        def rehearse() -> None:
            self._upload(empty_ints(packing.shape, self.table.trash_row))
            self._step(plan, packing)
            self._upload(packing.ints)

        self._upload(packing.ints)
        try:
            return graphs.run(packing.shape, lambda: self._step(plan, packing), rehearse)
        except RuntimeError as error:
            # of several ranks, one alone cannot go another way
            if not is_out_of_memory(error) or self._decoder.group.size > 1:
                raise
        # a graph needs memory of its own: without it the step runs kernel by kernel
        release_cached_memory()
        self._upload(packing.ints)
        return self._step(plan, packing)

    def _upload(self, ints: array[int]) -> None:
        """Copy a packing to the device: the step's one copy."""
        staged = torch.frombuffer(ints, dtype=torch.int32)
        if self._packed.is_cuda:
            staged = staged.pin_memory()
        self._packed[: len(ints)].copy_(staged, non_blocking=True)

    def _step(self, plan: StepPlan, packing: Packing) -> StepOutputs:
        """The step's work on the device; all sizes come from the shape."""
        shape, table = packing.shape, self.table
        work = self._ops.begin(self._packed, shape)
        given = work.tensors
        step = AttentionStep(
            plan=plan,
            kv=self.kv,
            selects={s.row: table.host[s.row].select for s in plan.spans if s.selects},
            spans=span_fields(self._packed, shape),
            starts=given.starts,
            indices=packing.indices,
            tokens=shape.tokens,
            max_q=shape.max_q,
            positions=given.positions,
            owners=given.owners,
            ahead=bool(shape.pick or shape.blind),
            group=self._decoder.group,
        )
        rows = given.head_rows
        if len(given.head_uncond):
            rows = torch.cat((rows, given.head_uncond))
        context = self._backend.prepare(step)
        meter = None
        if "drift" in shape.needs:
            from dllmserve.runtime.drift import DriftMeter

            context = meter = DriftMeter(context, step, table, self.spec.num_layers // 2)
        constraint = self._constraint(shape)
        if constraint is not None:
            constraint.begin(self._packed, shape, table)
        expected, canvas = self._head.expected, None
        if expected is not None:
            canvas = expected.tokens(self._packed, shape, given)
        hidden = self._decoder(given.ids, given.positions, context, rows, canvas)
        stats = self._head.stats(
            hidden,
            given.cfg_scale,
            given.row_params,
            shape.segments,
            shape.needs,
            StepEdits(
                with_left(given, shape, self.spec),
                self._edits,
                table.last,
                candidate_ids(plan, packing, table, given.cells),
                constraint,
            ),
        )
        keep = None if meter is None else meter.keep
        if constraint is None:
            return work.finish(stats, keep)
        return self._finish(work, constraint, (stats, hidden, keep), shape)

    def _finish(
        self,
        work: StepWork,
        constraint: ConstraintEdit,
        found: tuple[TokenStats, Tensor, Callable[[], None] | None],
        shape: StepShape,
    ) -> StepOutputs:
        """The end of a step with constrained entries, which may write what nobody proposed.

        Args:
            work: the step.
            constraint: says what fits.
            found: statistics, hidden states of the LM-head rows, and what else is written.
            shape: the step's.
        """
        stats, hidden, keep = found
        given, logprobs = work.tensors, stats.logprobs

        def settle(update: Update, view: RuleView) -> Update:
            nonlocal logprobs
            update = constraint.settle(update, view)
            if logprobs and given.cells is not None:
                tokens = tokens_of(update, self._packed, shape, given.cells)
                scale = given.cfg_scale
                logprobs = self._head.of_tokens(logprobs, tokens, hidden, scale, shape.segments)
            return update

        outputs = work.finish(stats, keep, settle)
        return replace(outputs, holds=constraint.holds(shape, self.table), logprobs=logprobs)

    def _constraint(self, shape: StepShape) -> ConstraintEdit | None:
        """What keeps constrained entries to their grammars; None if the step has none."""
        if not shape.constrained:
            return None
        found: Any = self._edits["constraint"]
        return cast("ConstraintEdit", found)
