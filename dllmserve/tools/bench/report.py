"""The report: a header and a table for people, one record for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from dllmserve.config import EngineConfig
from dllmserve.core.budget import size_text
from dllmserve.core.validator import settled
from dllmserve.engine.setup import EnginePlan
from dllmserve.runtime.platform import device_facts
from dllmserve.tools.bench.roofline import Ceilings
from dllmserve.tools.bench.run import Result
from dllmserve.tools.bench.workload import Workload
from dllmserve.tools.environment import dtype_name, environment, header_lines
from dllmserve.tools.text import counted, header, known, rate_text, rule_text, table

#: version of the record's layout, raised when a key changes its meaning or goes away
SCHEMA = 2
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
            **header_lines(self.config, self.plan),
            "workload": self._workload_text(),
            "memory": f"planned: {self.plan.memory.equation()}",
            "ceilings": self._ceilings_text(),
        }
        return header(lines, filter(None, ["; ".join(self.notes())]))

    def table(self) -> Table:
        """One row per result."""
        return table([_cells(result) for result in self.results])

    def title(self) -> str:
        """What was measured, for a picture."""
        name = device_facts(self.plan.device)["name"]
        first = f"{self.benchmark}: {self.config.model}, {dtype_name(self.plan)}, {name}"
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
        work, memory = self.workload, self.plan.memory
        found = environment(self.config, self.plan)
        sampling = asdict(work.params)
        return {
            "benchmark": self.benchmark,
            "schema": SCHEMA,
            **found,
            "options": {
                **found["options"],
                "sampling": sampling,
                "sparse": sampling["sparse"],
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
        work, params = self.workload, settled(self.workload.params, self.plan.spec)
        if self.plan.spec.geometry != "full" and params.steps_per_block is None:
            params = replace(params, steps_per_block=params.resolved_block_length)
        cache = f"cache {params.cache}"
        if (sparse := params.sparse) is not None:
            heads = "per head" if sparse.head_select else "for all heads"
            cache = (
                f"sparse (keep {sparse.retention_ratio:g} {heads}, delay_step {sparse.delay_step})"
            )
        guided = f", cfg_scale {params.cfg_scale:g}" if params.cfg_scale else ""
        return (
            f"prompt {work.prompt_len} + answer {params.gen_length}, blocks of "
            f"{params.resolved_block_length}, {rule_text(params)}, "
            f"{cache}, temperature {params.temperature:g}{guided}, seed {work.seed}; "
            f"{counted(work.warmup, 'warm-up run')}, {counted(work.runs, 'timed run')}"
        )

    def _ceilings_text(self) -> str:
        found = self.ceilings
        fast = found.scaled_flop_per_second
        narrow = "" if fast is None else f", in e4m3 {fast / 1e12:,.0f} TFLOP/s"
        return (
            f"copy {found.bytes_per_second / 1e9:,.1f} GB/s ({size_text(found.copy_bytes)}), "
            f"matrix product {found.flop_per_second / 1e12:,.3f} TFLOP/s "
            f"({found.matrix_size} x {found.matrix_size}, {dtype_name(self.plan)}){narrow}"
        )


def _cells(result: Result) -> list[tuple[str, str]]:
    rate, latency = result.tokens_per_second, result.latency
    if latency is None:
        cells = {
            "requests": str(result.requests),
            "tokens/s": rate_text(rate.median),
            "min": rate_text(rate.min),
            "max": rate_text(rate.max),
        }
    else:
        cells = {
            "median\nlatency": f"{latency.median:.3f} s",
            "p90": f"{latency.p90:.3f} s",
            "max": f"{latency.max:.3f} s",
            "first\ntoken": f"{latency.first_token:.3f} s",
            "tokens/s": rate_text(rate.median),
        }
    cells["forwards"] = str(result.steps)
    if latency is None:  # the same number for a request that runs alone
        cells["forwards/\nrequest"] = f"{result.forwards_per_request:,.1f}"
    cells |= {
        "tokens/\nforward": f"{result.tokens_per_forward:.2f}",
        "ms/step" if latency is None else "ms/\nforward": f"{result.ms_per_step:,.2f}",
        "kernels\nrunning": known(result.kernels, lambda found: f"{found.share:.1%}", _NONE),
        "of the\nroofline": f"{result.roofline_fraction:.1%}",
        "peak\nmemory": known(result.peak_allocated, size_text, _NONE),
    }
    return list(cells.items())


def _result_record(result: Result) -> dict[str, Any]:
    rate = result.roofline_tokens_per_second
    return {**asdict(result), "roofline_tokens_per_second": rate}
