"""One slow decoder for every combination of parameters, built from the oracles' parts.

It decodes one prompt, keeps masks as flags, recomputes everything in plain loops, and uses the
package for two things only: SamplingParams and SparseConfig as plain data, and the counter-based
noise, which is the engine's own definition. tests/test_reference.py holds it to upstream's
outputs; the engine is then compared with it where upstream has nothing.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dllmserve.decoding.noise import position_uniforms, row_keys, token_uniforms
from dllmserve.sampling_params import SamplingParams
from dllmserve.sparse.state import SparseConfig
from tests.oracles import dream, rules, sparse_dllm
from tests.oracles.ends import Ends
from tests.oracles.models import KV, Forward, OracleModel
from tests.oracles.sampling import Rule


@dataclass(frozen=True)
class Answer:
    """A decoded answer."""

    ids: list[int]
    forwards: int
    finish_reason: str


def draws(seed: int, position: int, step: int) -> Tensor:
    """The engine's noise key [1] of one position in one forward."""
    return row_keys(torch.tensor([seed]), torch.tensor([position]), torch.tensor([step]))


def uniforms(seed: int, position: int, step: int, vocab: int) -> Tensor:
    """The engine's uniforms [V] that choose a token."""
    return token_uniforms(draws(seed, position, step), torch.arange(vocab))[0]


def position_uniform(seed: int, position: int, step: int) -> float:
    """The engine's uniform that ranks a position when remasking is random."""
    return float(position_uniforms(draws(seed, position, step)))


@dataclass
class Canvas:
    """Tokens and cache of one side: conditional, or with the prompt masked."""

    model: OracleModel
    prompt: list[int]
    cache: str
    sparse: SparseConfig | None
    ties: str
    past: list[KV] = field(default_factory=list)

    def logits(self, answer: list[int], start: int, end: int, t: int) -> Tensor:
        """Logits [end - start, V] of canvas positions [start, end) at step t of their block."""
        tokens = torch.tensor([self.prompt + answer])
        shift = int(self.model.shifted)
        first = start - shift
        refresh_until = self.sparse.delay_step if self.sparse else 0
        if t <= refresh_until or (self.cache == "none" and self.sparse is None):
            out = self.model.forward(tokens)
            if t == refresh_until:
                self._keep(out, start, end)
            return out.logits[0, first : end - shift]
        last = tokens.shape[1] if self.cache == "prefix" else end
        out = self.model.forward(
            tokens[:, first:last],
            torch.arange(first, last),
            [(k[:, :, :first], v[:, :, :first]) for k, v in self.past]
            if self.cache == "prefix"
            else self.past,
            first if self.cache == "dual" else None,
        )
        return out.logits[0, : end - start]

    def _keep(self, out: Forward, start: int, end: int) -> None:
        self.past = out.kv
        if self.sparse is None:
            return
        # the window's own tokens never compete, nor does the one that a shifted model recomputes
        how = sparse_dllm.Eviction(
            self.sparse.retention_ratio,
            self.sparse.pool_kernel,
            self.sparse.head_select,
            self.ties,
        )
        total = out.logits.shape[1]
        until = min(max(end, start + self.sparse.default_block_len), total)
        inside = range(start - int(self.model.shifted), until)
        outside = [i for i in range(total) if i not in inside]
        self.past = []
        for (k, v), q in zip(out.kv, out.queries, strict=True):
            block = q[0, :, start:until].transpose(0, 1)
            keys, count = k[0].transpose(0, 1), self.sparse.keep(len(outside))
            if self.sparse.score == "attention":
                chosen = sparse_dllm.by_attention(
                    block, keys, outside, count, how.kernel, how.head_select
                )
            else:
                # a ratio that gives the count, however it came about
                exact = how._replace(ratio=(count + 0.5) / max(len(outside), 1))
                chosen = sparse_dllm.select(block, keys[outside], exact)
            picks = [[outside[i] for i in head] for head in chosen]
            kept = torch.stack([k[0, h, pick] for h, pick in enumerate(picks)])
            values = torch.stack([v[0, h, pick] for h, pick in enumerate(picks)])
            self.past.append((kept[None], values[None]))


def proposals(
    z: Tensor, params: SamplingParams, mask_id: int, place: tuple[int, int, int], ends: Ends
) -> tuple[list[int], list[float]]:
    """Token and score of each row of logits z [Q, V].

    ``place`` is the seed, the first row's position and the forward. What ``ends`` takes the
    confidence of comes last, whatever the score is made of.
    """
    seed, start, forwards = place
    scaled = z.double() / params.temperature if params.temperature > 0 else z.double()
    allowed = dream.filtered(scaled.float(), params.top_p, params.top_k or None)
    others = scaled.float().clone()
    others[:, mask_id] = -torch.inf
    best = others.argmax(dim=-1, keepdim=True)  # besides the mask, the best one always stays
    allowed = allowed.scatter(1, best, others.gather(1, best))
    base = allowed if params.schedule == "dream" else z
    p = ends.after(base.double(), params.temperature).softmax(dim=-1)
    candidates = allowed.double().clone()
    candidates[:, mask_id] = -torch.inf
    tokens: list[int] = []
    scores: list[float] = []
    for j in range(z.shape[0]):
        here = (seed, start + j, forwards)
        noisy = candidates[j]
        if params.temperature > 0:
            noisy = noisy - (-uniforms(*here, z.shape[1]).log()).log()
        token = int(noisy.argmax())
        alg = {"margin": "topk_margin", "neg_entropy": "entropy"}.get(params.confidence)
        score = float(dream.confidences(p[j : j + 1], alg)) if alg else float(p[j, token])
        if params.unmask == "entropy_bound":
            score = -float(torch.special.entr(p[j]).sum())
        if token in ends.lost(params.temperature):
            entropic = "neg_entropy" in params.confidence or params.unmask == "entropy_bound"
            score = -torch.inf if entropic else 0.0
        tokens.append(token)
        scores.append(position_uniform(*here) if params.remasking == "random" else score)
    return tokens, scores


def counts_of(params: SamplingParams, length: int, steps: int) -> list[int]:
    """Tokens of each step of a block; steps that write nothing are no forwards."""
    if params.schedule == "dream":
        counts = rules.dream_counts(length, steps, params.eps)
    else:
        counts = rules.split(length, steps)
    return [count for count in counts if count > 0]


def rule_of(params: SamplingParams, counts: list[int], t: int) -> Rule:
    """The unmask rule of step t of a block."""
    if params.unmask == "steps":
        return partial(rules.steps, count=counts[t])
    if params.unmask == "threshold":
        return partial(rules.threshold, tau=params.threshold)
    if params.unmask == "factor":
        return partial(rules.factor, f=params.factor)
    return lambda scores, masked: rules.entropy_bound(
        [-s for s in scores], masked, params.entropy_bound
    )


def blocks_of(params: SamplingParams, sparse: SparseConfig | None) -> list[tuple[int, int, int]]:
    """Answer range and steps of each block: steps as even as can be, at least one."""
    length = params.block_length or (sparse.default_block_len if sparse else params.gen_length)
    starts = range(0, params.gen_length, length)
    steps = rules.split(params.steps, len(starts))
    return [
        (start, min(start + length, params.gen_length), max(count, 1))
        for start, count in zip(starts, steps, strict=True)
    ]


def ended(ids: list[int], masked: list[bool], eos_ids: tuple[int, ...]) -> int | None:
    """Index of the first end id with nothing masked before it."""
    for index, token in enumerate(ids):
        if masked[index]:
            return None
        if token in eos_ids:
            return index
    return None


@torch.inference_mode()
def decode(
    model: OracleModel,
    prompt: list[int],
    params: SamplingParams,
    sparse: SparseConfig | None = None,
    *,
    eos_ids: tuple[int, ...] = (),
    turn_ids: tuple[int, ...] = (),
    ties: str = "topk",
) -> Answer:
    """Decode one prompt; eos_ids end it unless params.ignore_eos, turn_ids among them a turn."""
    mask, size, base = model.mask_id, params.gen_length, len(prompt)
    sides = [Canvas(model, prompt, params.cache, sparse, ties)]
    if params.cfg_scale > 0:
        sides.append(Canvas(model, [mask] * base, params.cache, sparse, ties))
    text_ids = tuple(i for i in eos_ids if i not in turn_ids)
    ends = Ends(text_ids, turn_ids, params.logits_eos_inf, params.confidence_eos_eot_inf)
    ids, masked, forwards = [mask] * size, [True] * size, 0
    for start, end, steps in blocks_of(params, sparse):
        counts = counts_of(params, end - start, steps)
        t = 0
        while any(masked[start:end]):
            z, *twin = (side.logits(ids, base + start, base + end, t) for side in sides)
            if twin:
                z = twin[0] + (params.cfg_scale + 1) * (z - twin[0])
            for token, value in (params.logit_bias or {}).items():
                z[:, token] += value
            place = (params.seed or 0, base + start, forwards)
            tokens, scores = proposals(ends.before(z), params, mask, place, ends)
            for offset in rule_of(params, counts, t)(scores, masked[start:end]):
                ids[start + offset], masked[start + offset] = tokens[offset], False
            t, forwards = t + 1, forwards + 1
            stop = None if params.ignore_eos else ended(ids, masked, eos_ids)
            if stop is not None:
                return Answer(ids[: stop + 1], forwards, "stop")
    return Answer(ids, forwards, "length")
