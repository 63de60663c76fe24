"""A step on the meta device: no value is ever read by the host, no tensor left behind.

Meta tensors have shapes but no data, so a hidden ``.item()``, ``nonzero`` or boolean index
raises here, and so does an operation that mixes in a tensor from another device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllmserve import SamplingParams, SparseConfig
from dllmserve._settings import with_sparse
from dllmserve.attention.backend import KVStore
from dllmserve.attention.sdpa import SdpaBackend
from dllmserve.catalog import CACHES
from dllmserve.core.limits import Limits
from dllmserve.core.plan import EntryReport
from dllmserve.core.request import Request
from dllmserve.core.rows import row_inits
from dllmserve.core.scheduler import Scheduler
from dllmserve.models.loader import empty_decoder, find_model, read_config, read_spec
from dllmserve.parallel.partition import Partition
from dllmserve.runtime.edits import EditSizes, make_edits
from dllmserve.runtime.logits import LogitsHead
from dllmserve.runtime.runner import ModelRunner
from dllmserve.runtime.state_table import StateTable
from tests.helpers import prompt_request

META = torch.device("meta")
LENGTH = 256


class NoBlockingCopies(TorchDispatchMode):
    """Refuses copies from the host that wait for the device to take them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        # in inference mode .to() arrives here whole, elsewhere as _to_copy
        copies = func.overloadpacket.__name__ in ("to", "_to_copy", "copy_")
        if copies and len({t.device for t in (*args, result) if isinstance(t, Tensor)}) > 1:
            assert options.get("non_blocking") or args[2:], f"a blocking copy: {func}"
        return result


def _requests() -> list[Request]:
    """Every policy, rule, confidence and sampler in one batch."""
    block = {"gen_length": 64, "block_length": 32}
    bias = {7: -100.0, 9: 2.5, 11: 100.0}
    given: list[tuple[SamplingParams, SparseConfig | None]] = [
        (SamplingParams(temperature=0.0, steps=32, **block), None),
        (SamplingParams(top_p=0.9, top_k=5, steps=32, cache="dual", cfg_scale=1.0, **block), None),
        (SamplingParams(temperature=0.0, unmask="threshold", cache="prefix", **block), None),
        (SamplingParams(temperature=0.0, unmask="entropy_bound", **block), SparseConfig()),
        (
            SamplingParams(temperature=0.0, unmask="factor", confidence="margin", **block),
            SparseConfig(head_select=False, delay_step=0),
        ),
        (
            SamplingParams(
                schedule="dream", confidence="neg_entropy", remasking="random", gen_length=64
            ),
            None,
        ),
        (SamplingParams(temperature=0.0, steps=32, logit_bias=bias, **block), None),
        (SamplingParams(top_p=0.9, cfg_scale=1.0, logit_bias={8: 1}, **block), None),
        (SamplingParams(unmask="threshold_strict", cache="dual", early_end=True, **block), None),
        (SamplingParams(unmask="factor_strict", cache="rolling", suffix_window=9, **block), None),
        (SamplingParams(unmask="hierarchy", cache="delayed", **block), None),
        (
            SamplingParams(
                unmask="credit", cache="drift", refresh_every=2, logit_bias=bias, **block
            ),
            None,
        ),
        (SamplingParams(unmask="klass", cache="dual", refresh_window=4, **block), None),
        (SamplingParams(unmask="wino", cache="dual", **block), None),
        (SamplingParams(steps=32, cfg_scale=1.0, cache="delayed", **block), None),
        (SamplingParams(steps=32, **block), SparseConfig(score="attention", min_keep=8)),
        (SamplingParams(temperature=0.0, steps=32, logprobs=3, **block), None),
        (SamplingParams(cfg_scale=1.0, logit_bias=bias, logprobs=20, top_p=0.9, **block), None),
        (SamplingParams(unmask="wino", cache="dual", logprobs=0, **block), None),
        (
            SamplingParams(unmask="joint", penalty_lambda=1.0, cache="dual", logprobs=1, **block),
            None,
        ),
        (SamplingParams(temperature=0.0, steps=32, logprobs=0, **block), None),
    ]
    requests = [
        prompt_request(i, [5] * (10 + i), with_sparse(params, sparse), seed=i)
        for i, (params, sparse) in enumerate(given)
    ]
    requests[-1].candidates = ((1, 2), ()) * 32
    return requests


def test_a_mixed_step_reads_nothing_back_to_the_host() -> None:
    spec = read_spec(read_config(find_model("tiny")))
    limits = Limits(
        max_model_len=LENGTH,
        max_num_seqs=32,
        max_num_batched_tokens=8192,
        max_logit_rows=1024,
        page_size=32,
        num_pages=200,
        max_history_rows=64,
    )
    policies = {name: CACHES[name].load()() for name in CACHES}
    scheduler = Scheduler(spec, limits, policies.__getitem__)
    kv = KVStore.create(
        spec,
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        num_rows=limits.max_num_seqs,
        pages_per_row=LENGTH // limits.page_size,
        dtype=torch.bfloat16,
        device=META,
    )
    table = StateTable(limits.max_num_seqs, LENGTH, META, len(spec.eos_ids))
    decoder = empty_decoder(Partition(spec), dtype=torch.bfloat16, device=META, max_len=LENGTH)
    head = LogitsHead(decoder.head.weight, limits.max_logit_rows, spec.mask_id)
    sizes = EditSizes(
        rows=limits.max_num_seqs + 1,
        slots=limits.max_history_rows,
        max_len=LENGTH,
        ids=spec.embedding_size,
        spec=spec,
    )
    edits = make_edits(sizes, decoder.vocab, META)
    runner = ModelRunner(decoder, table, kv, SdpaBackend(spec), head, edits=edits)
    requests = _requests()
    for request in requests:
        scheduler.add(request)
    for _ in range(4):  # the first blocks go through refresh, selection and reuse
        plan, picked, admitted = scheduler.schedule()
        plan.validate(LENGTH)
        assert len(picked) == len(requests)
        with NoBlockingCopies():
            for request in admitted:
                for init in row_inits(request, spec):
                    runner.admit(init)
            handle = runner.execute(plan)
        assert handle.proposals.tokens.device == META
        progress = [EntryReport(r.progress.masks_left - 1, 0, -1) for r in picked]
        scheduler.commit(picked, progress)
