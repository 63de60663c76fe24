"""The report: a header and a table for people, one record for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from dllmserve.config import EngineConfig
from dllmserve.core.budget import size_text
from dllmserve.engine.setup import EnginePlan
from dllmserve.runtime.platform import device_facts
from dllmserve.tools.bench.environment import (
    device_text,
    dtype_name,
    engine_facts,
    engine_text,
    facts,
    model_text,
)
from dllmserve.tools.bench.roofline import Ceilings
from dllmserve.tools.bench.run import Result
from dllmserve.tools.bench.text import counted, header_line, rate_text
from dllmserve.tools.bench.workload import Workload

#: version of the record's layout, raised when a key changes its meaning or goes away
SCHEMA = 1
_NONE = "n/a"


@dataclass(frozen=True)
class Report:
    """Everything that one benchmark command has to say.

    Attributes:
        benchmark: "throughput" or "latency".
        config: engine options.
        plan: the engine's sizes.
        workload: what was asked of it.
        ceilings: of the device.
        results: one per number of requests.
    """

    benchmark: str
    config: EngineConfig
    plan: EnginePlan
    workload: Workload
    ceilings: Ceilings
    results: Sequence[Result]

    def header(self) -> str:
        """What was measured, on what; lines of at most text.WIDTH columns."""
        lines = {
            "model": model_text(self.config, self.plan),
            "device": device_text(self.plan),
            "engine": engine_text(self.config, self.plan),
            "workload": self._workload_text(),
            "memory": f"planned: {self.plan.memory.equation()}",
            "ceilings": self._ceilings_text(),
        }
        if notes := self.notes():
            lines["note"] = "; ".join(notes)
        return "\n".join(header_line(label, text) for label, text in lines.items())

    def table(self) -> Table:
        """One row per result."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
        rows = [
            _latency_cells(result) if result.latency is not None else _throughput_cells(result)
            for result in self.results
        ]
        for name in rows[0]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        return table

    def title(self) -> str:
        """What was measured, for a picture."""
        name = device_facts(self.plan.device)["name"]
        first = f"{self.benchmark}: {self.config.model}, {dtype_name(self.plan.dtype)}, {name}"
        text = self._workload_text().partition(";")[0]
        return f"{first}\n{text}"

    def notes(self) -> list[str]:
        """What a reader of the figures should know."""
        rows, room = self.workload.rows_per_request, self.config.max_num_seqs
        waiting = [
            f"{result.requests} requests need {result.requests * rows} rows, over "
            f"max_num_seqs={room}: some wait for others"
            for result in self.results
            if result.requests * rows > room
        ]
        above = [
            f"{result.requests} requests ran above the roofline: the ceilings are too low, "
            "probably because the device was busy while they were measured"
            for result in self.results
            if result.roofline_fraction > 1
        ]
        return waiting + above

    def record(self) -> dict[str, Any]:
        """The JSON record; docs/benchmarks.md describes it."""
        plan, work, memory = self.plan, self.workload, self.plan.memory
        return {
            "benchmark": self.benchmark,
            "schema": SCHEMA,
            **facts(self.config, plan),
            "options": {
                **engine_facts(self.config, plan),
                "sampling": asdict(work.params),
                "sparse": None if work.params.sparse is None else asdict(work.params.sparse),
                "prompt_len": work.prompt_len,
                "seed": work.seed,
                "runs": work.runs,
                "warmup": work.warmup,
            },
            "memory": {
                **asdict(memory),
                "planned": memory.planned,
                "allowed": memory.allowed,
            },
            "ceilings": asdict(self.ceilings),
            "notes": self.notes(),
            "results": [_result_record(result) for result in self.results],
        }

    def _workload_text(self) -> str:
        work, params = self.workload, self.workload.params
        cache = f"cache {params.cache}"
        if (sparse := params.sparse) is not None:
            heads = "per head" if sparse.head_select else "for all heads"
            cache = (
                f"sparse (keep {sparse.retention_ratio:g} {heads}, delay_step {sparse.delay_step})"
            )
        rule = {
            "steps": f"{params.steps} steps",
            "threshold": f"threshold {params.threshold:g}",
            "factor": f"factor {params.factor:g}",
            "entropy_bound": f"entropy_bound {params.entropy_bound:g}",
        }.get(params.unmask, params.unmask)
        guided = f", cfg_scale {params.cfg_scale:g}" if params.cfg_scale else ""
        return (
            f"prompt {work.prompt_len} + answer {params.gen_length}, blocks of "
            f"{params.resolved_block_length}, {rule}, "
            f"{cache}, temperature {params.temperature:g}{guided}, seed {work.seed}; "
            f"{counted(work.warmup, 'warm-up run')}, {counted(work.runs, 'timed run')}"
        )

    def _ceilings_text(self) -> str:
        found = self.ceilings
        return (
            f"copy {found.bytes_per_second / 1e9:,.1f} GB/s ({size_text(found.copy_bytes)}), "
            f"matrix product {found.flop_per_second / 1e12:,.3f} TFLOP/s "
            f"({found.matrix_size} x {found.matrix_size}, {dtype_name(self.plan.dtype)})"
        )


def _throughput_cells(result: Result) -> dict[str, str]:
    rate = result.tokens_per_second
    return {
        "requests": str(result.requests),
        "tokens/s": rate_text(rate.median),
        "min": rate_text(rate.min),
        "max": rate_text(rate.max),
        **_common_cells(result, "ms/step"),
    }


def _latency_cells(result: Result) -> dict[str, str]:
    latency = result.latency
    if latency is None:
        raise ValueError("a result of the throughput benchmark has no latency")
    return {
        "median\nlatency": f"{latency.median:.3f} s",
        "p90": f"{latency.p90:.3f} s",
        "max": f"{latency.max:.3f} s",
        "first\ntoken": f"{latency.first_token:.3f} s",
        "tokens/s": rate_text(result.tokens_per_second.median),
        **_common_cells(result, "ms/\nforward"),
    }


def _common_cells(result: Result, step: str) -> Mapping[str, str]:
    kernels, peak = result.kernels, result.peak_allocated
    cells = {
        "forwards": str(result.steps),
        "forwards/\nrequest": f"{result.forwards_per_request:,.1f}",
        "tokens/\nforward": f"{result.tokens_per_forward:.2f}",
        step: f"{result.ms_per_step:,.2f}",
        "kernels\nrunning": _NONE if kernels is None else f"{kernels.share:.1%}",
        "of the\nroofline": f"{result.roofline_fraction:.1%}",
        "peak\nmemory": _NONE if peak is None else size_text(peak),
    }
    if result.latency is not None:
        del cells["forwards/\nrequest"]  # the same number for a request that runs alone
    return cells


def _result_record(result: Result) -> dict[str, Any]:
    rate = result.roofline_tokens_per_second
    return {**asdict(result), "roofline_tokens_per_second": rate}
