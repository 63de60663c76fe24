"""ModelRunner: executes a plan on one device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dllmserve.attention.backend import AttentionBackend, KVStore, host_to_device
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.plan import StepEntry, StepPlan
from dllmserve.core.rows import FloatField, IntField, RowInit
from dllmserve.core.scheduler import EntryReport
from dllmserve.decoding.noise import position_uniforms, row_keys
from dllmserve.decoding.rule import RuleView, UnmaskRule
from dllmserve.decoding.stats import RowParams, TokenStats
from dllmserve.models.decoder import Decoder
from dllmserve.registry import UNMASK_RULES, resolve
from dllmserve.runtime.inputs import StepInputs, build_inputs
from dllmserve.runtime.logits import LogitsHead, Segment
from dllmserve.runtime.state_table import StateTable
from dllmserve.sampling_params import CONFIDENCE


@dataclass(frozen=True)
class Proposals:
    """What the model proposed in a step, for requests that are being watched.

    Attributes:
        tokens, confidence: [n, W] proposed ids and their confidence (-inf: not eligible).
    """

    tokens: Tensor
    confidence: Tensor


class StepHandle:
    """A step in flight. ``result()`` is the only place where the host waits."""

    def __init__(self, report: Tensor, proposals: Proposals, blocks: list[tuple[int, int]]) -> None:
        self._report = report
        self.proposals = proposals
        #: canvas start and length of each entry's block
        self.blocks = blocks

    def result(self) -> list[EntryReport]:
        """Wait for the device and return one report per entry."""
        return [EntryReport(*row) for row in self._report.tolist()]


class ModelRunner:
    """Model, state, K,V pages and LM head of one device.

    Args:
        decoder: the loaded model.
        table: state rows.
        kv: K,V pages.
        backend: attention.
        max_logit_rows: rows of logits that may exist at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        table: StateTable,
        kv: KVStore,
        backend: AttentionBackend,
        max_logit_rows: int,
    ) -> None:
        self.spec: ModelSpec = decoder.spec
        self.table = table
        self.kv = kv
        self._decoder = decoder
        self._backend = backend
        self._head = LogitsHead(decoder.head_weight, max_logit_rows, decoder.spec.mask_id)
        self._rules: dict[str, UnmaskRule] = {n: resolve(UNMASK_RULES, n)() for n in UNMASK_RULES}
        self._eos = host_to_device(decoder.spec.eos_ids, table.device)

    @torch.inference_mode()  # the table may have been made in this mode
    def admit(self, init: RowInit) -> None:
        """Fill a row of the state table and its page table."""
        self.table.write_row(init)
        if init.pages:
            pages = host_to_device(init.pages, self.table.device)
            self.kv.page_table[init.row, : len(init.pages)] = pages

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepHandle:
        """Run one step: forward, statistics, rules, report. Does not wait for the device."""
        inputs = build_inputs(plan, self.table, self.spec.mask_id, self.spec.logit_shift)
        selects = {s.row: self.table.host[s.row].select for s in plan.spans}
        context = self._backend.prepare(plan, self.kv, selects)
        hidden = self._decoder(inputs.ids, inputs.positions, context)
        stats, keys = self._stats(plan, inputs, hidden)
        confidence, entropy, tokens = self._block_view(plan, inputs, stats, keys)
        self._apply_rules(plan, inputs, confidence, entropy, tokens)
        report = self._report(plan, inputs, stats)
        blocks = [(e.span.blk_start, e.span.blk_len) for e in plan.entries]
        return StepHandle(report, Proposals(tokens, confidence), blocks)

    def _stats(
        self, plan: StepPlan, inputs: StepInputs, hidden: Tensor
    ) -> tuple[TokenStats, Tensor]:
        """LM head on the masked rows of all entries; also their noise keys."""
        table = self.table
        width = inputs.block.shape[1]
        owner = inputs.rows[inputs.head_cells // width]  # [M] state rows
        keys = row_keys(
            table.int_field(owner, IntField.SEED),
            inputs.block.flatten()[inputs.head_cells],
            table.forwards[owner],
        )
        params = RowParams(
            temperature=table.float_field(owner, FloatField.TEMPERATURE),
            top_p=table.float_field(owner, FloatField.TOP_P),
            top_k=table.int_field(owner, IntField.TOP_K),
            tempered=table.int_field(owner, IntField.TEMPERED) > 0,
            keys=keys,
        )
        stats = self._head.stats(
            hidden,
            inputs.head_rows,
            inputs.head_uncond,
            table.float_field(owner, FloatField.CFG_SCALE),
            params,
            self._segments(plan),
            self._needs(plan),
        )
        return stats, keys

    def _segments(self, plan: StepPlan) -> list[Segment]:
        """Runs of entries with the same needs, by what the host knows of their rows."""
        host = self.table.host

        def flags(entry: StepEntry) -> tuple[bool, bool, bool]:
            init = host[entry.span.row]
            return entry.uncond is not None, init.sampled, init.filtered

        return [
            Segment(sum(e.masks for e in entries), *kind)
            for kind, entries in groupby(plan.entries, key=flags)
        ]

    def _needs(self, plan: StepPlan) -> frozenset[str]:
        needs: set[str] = set()
        for entry in plan.entries:
            needs |= self._rules[entry.rule].needs
            confidence = self.table.host[entry.span.row].confidence
            needs |= {"margin": {"margin"}, "neg_entropy": {"entropy"}}.get(confidence, set())
        return frozenset(needs)

    def _block_view(
        self, plan: StepPlan, inputs: StepInputs, stats: TokenStats, keys: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Spread the [M] statistics over the [n, W] block cells."""
        table, cells = self.table, inputs.head_cells
        width = inputs.block.shape[1]
        owner = inputs.rows[cells // width]
        kind = table.int_field(owner, IntField.CONFIDENCE)
        value = stats.prob
        if stats.margin is not None:
            value = torch.where(kind == CONFIDENCE.index("margin"), stats.margin, value)
        if stats.entropy is not None:
            value = torch.where(kind == CONFIDENCE.index("neg_entropy"), -stats.entropy, value)
        random = table.int_field(owner, IntField.RANDOM_REMASKING) > 0
        value = torch.where(random, position_uniforms(keys), value)

        shape = inputs.block.shape
        flat = torch.full(
            (inputs.block.numel(),), -torch.inf, dtype=torch.float64, device=table.device
        )
        confidence = flat.scatter(0, cells, value).view(shape)
        tokens = torch.zeros_like(inputs.block).flatten().scatter(0, cells, stats.token)
        entropy = None
        if stats.entropy is not None:
            high = torch.full_like(confidence, torch.inf).flatten()
            entropy = high.scatter(0, cells, stats.entropy).view(shape)
        return confidence, entropy, tokens.view(shape)

    def _apply_rules(
        self,
        plan: StepPlan,
        inputs: StepInputs,
        confidence: Tensor,  # [n, W] float64
        entropy: Tensor | None,  # [n, W] float64
        tokens: Tensor,  # [n, W] int64
    ) -> None:
        """Apply each rule to its entries and write the result into the state table."""
        by_rule: dict[str, list[int]] = {}
        for index, entry in enumerate(plan.entries):
            by_rule.setdefault(entry.rule, []).append(index)
        table = self.table
        for name, members in by_rule.items():
            everyone = len(by_rule) == 1
            pick = slice(None) if everyone else host_to_device(members, table.device)
            rows = inputs.rows[pick]
            forwards = table.forwards[rows].clamp(max=table.quotas.shape[1] - 1)
            view = RuleView(
                eligible=inputs.eligible[pick],
                tokens=tokens[pick],
                confidence=confidence[pick],
                entropy=entropy[pick] if entropy is not None else None,
                quota=table.quotas[rows, forwards],
                threshold=table.float_field(rows, FloatField.THRESHOLD),
                factor=table.float_field(rows, FloatField.FACTOR),
                entropy_bound=table.float_field(rows, FloatField.ENTROPY_BOUND),
            )
            update = self._rules[name].apply(view)
            self._write(rows, inputs.block[pick], update.tokens, update.write)
        guided = plan.guided
        if guided:  # both rows of a guided request hold the same answer
            block = inputs.block[-guided:]
            source = inputs.rows[-guided:, None]
            table.tokens[inputs.uncond_rows[:, None], block] = table.tokens[source, block]
            table.masked[inputs.uncond_rows[:, None], block] = table.masked[source, block]
        table.forwards[inputs.rows] += 1

    def _write(self, rows: Tensor, block: Tensor, tokens: Tensor, write: Tensor) -> None:
        """Write [n, W] tokens where ``write`` [n, W] says so; cells outside are trash."""
        table, index = self.table, rows[:, None]
        table.tokens[index, block] = torch.where(write, tokens, table.tokens[index, block])
        table.masked[index, block] = table.masked[index, block] & ~write

    def _report(self, plan: StepPlan, inputs: StepInputs, stats: TokenStats) -> Tensor:
        """[n, 4] int64: masks left, frontier, first EOS before it or -1, rows without numbers."""
        table, rows = self.table, inputs.rows
        inside = inputs.block < table.max_len
        left = (table.masked[rows[:, None], inputs.block] & inside).sum(dim=-1)
        longest = max(table.host[e.span.row].gen_length for e in plan.entries)
        place = torch.arange(longest, device=table.device)
        prompt = table.int_field(rows, IntField.PROMPT_LEN)[:, None]
        length = table.int_field(rows, IntField.GEN_LENGTH)[:, None]
        columns = torch.where(place < length, prompt + place, table.max_len)
        open_ = table.masked[rows[:, None], columns] | (place >= length)
        frontier = torch.where(open_, place, longest).amin(dim=-1).clamp(max=longest)
        ends = torch.isin(table.tokens[rows[:, None], columns], self._eos)
        ends &= (place < frontier[:, None]) & (table.int_field(rows, IntField.IGNORE_EOS) == 0)[
            :, None
        ]
        first = torch.where(ends, place, longest).amin(dim=-1)
        eos = torch.where(first < longest, first, -1)
        owner = inputs.head_cells // inputs.block.shape[1]
        broken = torch.zeros_like(left).index_add(0, owner, stats.prob.isnan().long())
        return torch.stack((left, frontier, eos, broken), dim=1)
