"""SamplingParams: how one request is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dllmserve._checks import check_choice, check_float, check_known
from dllmserve._combinations import refusals
from dllmserve._lengths import DEFAULT_LENGTHS, settle_length
from dllmserve._settings import filled
from dllmserve._values import (
    LOGIT_BIAS_BOUND,
    MAX_GEN_LENGTH,
    MAX_LOGPROBS,
    MAX_STEPS,
    Filled,
    NotGiven,
    SparseConfig,
    Usual,
    normal_bias,
    normal_choice,
    normal_ids,
    normal_schema,
    normal_stop,
    rank,
)
from dllmserve.catalog import CACHES, RULES
from dllmserve.errors import InvalidParameterError
from dllmserve.knobs import check_knobs, columns, knob

REMASKING = ("low_confidence", "random")
CONFIDENCE = ("probability", "margin", "neg_entropy")
SCHEDULES = ("uniform", "dream", "mdlm")
#: forwards that unmask="klass" may look back
MAX_KL_HISTORY = 64


def cache_names() -> tuple[str, ...]:
    """What ``cache`` may be; sparse attention is chosen by a SparseConfig instead."""
    return tuple(name for name, info in CACHES.items() if info.named)


def _qualities() -> tuple[str, ...]:
    from dllmserve.presets import PRESETS  # which nobody needs who names no quality

    return tuple(PRESETS)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request. All of them may differ inside one batch.

    Attributes:
        temperature: 0 is greedy. Above 0, tokens are drawn by Gumbel noise in float64
            (LLaDA's ``add_gumbel_noise``): ``argmax(z - T ln(-ln u))``.
        max_tokens: the length of an autoregressive model's answer. For a diffusion model it is
            another name of gen_length: given alone, it sets that.
        ignore_eos: keep decoding after an end id; token_ids then has exactly gen_length ids.
        gen_length: length of the answer in tokens, 1 to 8192.
        steps: denoising steps for the whole answer, 1 to 8192, spread over the blocks as
            evenly as they can be, at least one a block. The rules with a schedule read it ("steps",
            "sequential" and "dynamic"), with full attention.
        steps_per_block: forwards of the schedule in each block, in place of steps; None: from steps
            with full attention, the block's length on block-causal models. For the rules with a
            schedule, "steps", "sequential" and "dynamic".
        cfg_scale: classifier-free guidance, ``l = l_u + (s + 1)(l_c - l_u)``; 0 is off.
        remasking: "low_confidence" keeps the most confident proposals, "random" keeps
            random ones (only with ``unmask="steps"``).
        block_length: diffusion block; None is the engine's default_block_length or the model's
            own, if there is one, else one block for the whole answer (with a SparseConfig: its
            default_block_len). The last block may be shorter.
        unmask: which positions are written in a step: "steps", "threshold", "dynamic", ...;
            docs/decoding.md explains each rule.
        threshold: least confidence for the rules that compare with one: "threshold"
            (Fast-dLLM), "threshold_strict" (SGLang, LLaDA2), "dynamic" (SDAR, LLaDA2),
            "threshold_dinfer", "hierarchy", "credit" (dInfer), "klass" (arXiv 2511.05664), "wino"
            and "joint" (SGLang; 0.5 unless given).
        factor: the factor f of ``unmask="factor"`` (Fast-dLLM) and "factor_strict".
        entropy_bound: entropy budget in nats of ``unmask="entropy_bound"``, and of "renoise" (0.1
            there unless given).
        low_threshold: least confidence of the best position of a run of masks, for
            ``unmask="hierarchy"``.
        kl_threshold, kl_history: ``unmask="klass"`` writes positions whose distribution moved
            by less than kl_threshold nats (KL divergence) in each of the last kl_history
            forwards of the block.
        threshold_back: ``unmask="wino"`` masks written positions again whose token, seen from
            the rest of the canvas, has a lower probability than this.
        confidence: "probability", "margin" (top-1 minus top-2) or "neg_entropy".
        schedule: how ``unmask="steps"`` spreads an answer over the steps: "uniform"
            (LLaDA), "dream" (Dream's ``t`` from 1 to eps; confidence is then taken from
            the tempered, filtered distribution, as Dream does) or "mdlm" (shares of what is left,
            rounded, of each block's own steps).
        eps: last time of the Dream schedule.
        cache: "none" (exact), "prefix" or "dual" (Fast-dLLM), "rolling", "delayed"
            (dKV-Cache) or "drift"; docs/caching.md explains each. On block-causal models "none" or
            "sub_block" (Fast-dLLM v2's block cache). A SparseConfig given to generate() selects
            sparse attention instead.
        refresh_delay: forwards of a block over the whole canvas after the first; the K,V of
            the last of them are kept. For caches "prefix", "dual" and "delayed".
        refresh_every: refresh again after this many forwards of a block; None does once a
            block. For every cache but "none" and "sub_block".
        refresh_window: tokens on both sides of the block that its reuse forwards compute as
            well (dInfer's vicinity). For caches "prefix" and "dual".
        refresh_share: share of the tokens outside the block that a refresh of cache "drift"
            computes, 0 to 1.
        suffix_window: masks behind the active block that forwards compute and see; None is all
            of them. A long gen_length then costs no more than a short one.
        early_end: once an end id is written, decode nothing behind it, and compute no block
            behind its own.
        end_padding: with early_end, the end id stands in all places behind it, and forwards
            compute and see them (early_stop in dInfer's loop of Fast-dLLM).
        sparse: sparse attention instead of a cache, a :class:`dllmserve.SparseConfig`; the
            sparse_configs of ``generate()`` set it. One that is not enabled becomes None.
        quality: "exact", "balanced" or "fast": values for the fields that are not given,
            chosen from measurements (see docs/decoding.md). None changes nothing. To
            ``dataclasses.replace`` all fields are given: make new SamplingParams to change it.
        logits_eos_inf: LLaDA's: never propose an id that ends the text. A turn may still end.
        confidence_eos_eot_inf: LLaDA's: proposals that end the text or the turn have no
            confidence, so they are written last; see docs/decoding.md for temperatures above 0.
        top_p: nucleus filter on the tempered distribution, in (0, 1]; 1 is off.
        top_k: keep the k most likely tokens; 0 is off.
        seed: repeats the request's random draws, whatever else is in the batch; None: a fresh one.
        stop: string or strings that end the answer; the text is cut before the match.
        sub_block_length: parts of a block that are filled one after another (Fast-dLLM v2's small
            blocks); None: the block at once. Without ``cache="sub_block"`` each forward computes
            the whole block.
        stop_token_ids: ids that end the answer beside the model's end ids, at most 16, and with
            ignore_eos alone. The id is the answer's last one.
        logit_bias: token id to a number in [-100, 100] that is added to the token's logit in
            every forward, as in OpenAI's API: after guidance, before temperature, top-p and
            top-k, and before confidences are taken. -100 bans a token, 100 all but forces
            it. At most 1024 ids; kept as an immutable dict, sorted by id, and None if empty.
        regex: the whole text of the answer matches this regular expression (Python's syntax).
        json_schema: the answer is JSON that is valid by it: a dict, or JSON text; kept as text.
        choice: the answer is one of these texts.
        logprobs: gives log-probabilities of tokens, and of so many of the likeliest, at most 20.
        edit_threshold: a written token of the active block is replaced if the model now proposes
            another with a higher probability than this (LLaDA2.1); None: it stays. With unmask
            "threshold_strict", "dynamic" and "joint" (0 there unless given).
        max_edit_steps: forwards of a block without masks, which edit it, at most; 0 leaves a block
            as soon as it has no mask.
        min_tokens_per_step: tokens that a step writes at least ("threshold_strict", "dynamic").
        penalty_lambda: with unmask="joint", taken off the logit of the token that stands one place
            to the left in the block.
        max_denoising_steps: with unmask="renoise" (DiffusionGemma), forwards of a canvas at most.
        t_max, t_min: of it, temperatures of a canvas's first forward, and of one behind its last;
            they fall evenly. ``temperature`` multiplies them where tokens are drawn, and 0 takes
            the likeliest; entropies are of the schedule's alone.
        stability_threshold, confidence_threshold: of it, a canvas is done when its likeliest tokens
            are those of so many forwards before, and the mean entropy is below so many nats.

    Numbers may be numpy's, and arrays or tensors without dimensions; they become plain ones.

    Raises:
        InvalidParameterError: (a ValueError) a field has a wrong type or value.
        UnknownOptionError: (a TypeError) an unknown keyword.

    Example:
        >>> SamplingParams(temperature=0.0, gen_length=64, steps=64, block_length=32).cache
        'none'
    """

    temperature: float = knob(
        1.0, "0 takes the likeliest token; more is more varied.", low=0, column=True
    )
    # not compared: gen_length is the length, under whatever name it was given
    max_tokens: int = knob(
        DEFAULT_LENGTHS[0],
        "Another name of gen_length.",
        low=1,
        high=MAX_GEN_LENGTH,
        own_check=True,
        compare=False,
    )
    ignore_eos: bool = knob(False, "Keep decoding after the end of the answer.")
    gen_length: int = knob(
        DEFAULT_LENGTHS[1],
        "Length of the answer in tokens, at most 8192.",
        low=1,
        high=MAX_GEN_LENGTH,
        own_check=True,
    )
    steps: int = knob(
        128,
        "Denoising steps for the whole answer, with full attention; fewer are faster (for "
        "unmask=steps, sequential, dynamic).",
        low=1,
        high=MAX_STEPS,
    )
    # logits overflow far above what is useful
    cfg_scale: float = knob(
        0.0,
        "Classifier-free guidance (full attention); 0 is off.",
        low=0,
        most_asked=1000,
        column=True,
    )
    remasking: str = knob(
        "low_confidence", "Which proposals are kept (for unmask=steps).", choices=REMASKING
    )
    block_length: int | None = knob(
        None,
        "Tokens per block; blocks are filled from left to right (autoregressive models: 1).",
        low=1,
        high=MAX_GEN_LENGTH,
    )
    unmask: str = knob(
        Filled("steps"), "Rule that chooses what is written in a step.", choices=RULES
    )
    threshold: float = knob(
        0.9,
        "Least confidence, for unmask=threshold, threshold_strict, threshold_dinfer, dynamic, "
        "hierarchy, credit, klass, wino, joint.",
        column=True,
        own_check=True,
    )
    factor: float = knob(1.0, "For unmask=factor and factor_strict.", low=0, column=True)
    entropy_bound: float = knob(
        Usual(0.15),
        "Entropy budget in nats, for unmask=entropy_bound, renoise.",
        low=0,
        column=True,
    )
    low_threshold: float = knob(
        0.4,
        "Least confidence of the best position of a run, for unmask=hierarchy.",
        low=0,
        high=1,
        column=True,
    )
    kl_threshold: float = knob(
        0.01,
        "Most that a distribution may move in a step, in nats, for unmask=klass.",
        low=0,
        column=True,
    )
    kl_history: int = knob(
        2,
        "Steps in which it must have moved so little, for unmask=klass.",
        low=1,
        high=MAX_KL_HISTORY,
        column=True,
    )
    threshold_back: float = knob(
        0.9,
        "Tokens less likely than this, seen from the rest, are masked again by unmask=wino.",
        low=0,
        high=1,
        column=True,
    )
    confidence: str = knob(
        "probability",
        "How sure the model is of a token: its probability, its lead over the second best, or "
        "minus the entropy.",
        choices=CONFIDENCE,
    )
    schedule: str = knob(
        "uniform", "How unmask=steps spreads the tokens over the steps.", choices=SCHEDULES
    )
    eps: float = knob(1e-3, "Last time of the Dream schedule.", low=0, low_open=True, high=1)
    cache: str = knob(
        "none",
        "K,V cache: none is exact, the others are faster and approximate; sub_block is for "
        "block-causal models, the rest for full attention.",
        choices=cache_names,
        own_check=True,
    )
    refresh_delay: int = knob(
        0,
        "Whole-canvas steps of a block after its first (cache=prefix, dual, delayed).",
        low=0,
        high=MAX_STEPS,
    )
    refresh_every: int | None = knob(
        None,
        "Refresh the cache after this many steps of a block, not only at its start.",
        low=1,
        high=MAX_STEPS,
    )
    refresh_window: int = knob(
        0,
        "Tokens around the block computed with it (cache=prefix, dual).",
        low=0,
        high=MAX_GEN_LENGTH,
    )
    refresh_share: float = knob(
        0.25, "Share of the other tokens that a refresh of cache=drift computes.", low=0, high=1
    )
    suffix_window: int | None = knob(
        None,
        "Masks behind the block that are computed and seen (full attention); all, if not given.",
        low=0,
        high=MAX_GEN_LENGTH,
    )
    early_end: bool = knob(
        False, "Decode nothing behind the first end of the answer (full attention)."
    )
    end_padding: bool = knob(False, "With early_end, end ids stand behind the end, and are seen.")
    top_p: float = knob(
        1.0,
        "Draw from the likeliest tokens that add up to this probability; 1 is off.",
        low=0,
        low_open=True,
        high=1,
        column=True,
    )
    top_k: int = knob(0, "Draw from the k likeliest tokens; 0 is off.", low=0)
    seed: int | None = knob(None, "Make random draws repeatable.", low=0, high=2**63 - 1)
    stop: str | Sequence[str] | None = knob(
        None, "End the answer before this text; several may be given.", own_check=True
    )
    logit_bias: Mapping[int, float] | None = knob(
        None,
        "Numbers from -100 (never) to 100 (always) that are added to the logits of token ids.",
        own_check=True,
    )
    quality: str | None = knob(
        None,
        "Preset of the decoding options; those that are given too keep their values.",
        choices=_qualities,
        own_check=True,
    )
    sparse: SparseConfig | None = knob(None, "Sparse attention instead of a cache.", own_check=True)
    logits_eos_inf: bool = knob(False, "Never propose an id that ends the text (LLaDA).")
    confidence_eos_eot_inf: bool = knob(
        False, "Write proposals that end the text or the turn last (LLaDA)."
    )
    steps_per_block: int | None = knob(
        None,
        "Forwards of the schedule in each block (from steps or the block's length, if not given).",
        low=1,
        high=MAX_STEPS,
    )
    sub_block_length: int | None = knob(
        None,
        "Tokens of the parts of a block that are filled one after another (block-causal models).",
        low=1,
        high=MAX_GEN_LENGTH,
    )
    stop_token_ids: Sequence[int] | None = knob(
        None, "Token ids that end the answer, too; also with ignore_eos.", own_check=True
    )
    regex: str | None = knob(None, "The answer matches this regular expression.", own_check=True)
    json_schema: Mapping[str, Any] | str | None = knob(
        None, "The answer is JSON that is valid by this JSON Schema.", own_check=True
    )
    choice: Sequence[str] | None = knob(
        None, "The answer is one of these texts; several may be given.", own_check=True
    )
    logprobs: int | None = knob(
        None, "Give log-probabilities: of so many of the likeliest, too.", low=0, high=MAX_LOGPROBS
    )
    edit_threshold: float | None = knob(
        None,
        "Replace written tokens of a block by others more probable than this (for "
        "unmask=threshold_strict, dynamic, joint).",
        low=0,
        high=1,
        column=True,
    )
    max_edit_steps: int = knob(
        16, "Most steps of a block without masks, for edits alone.", low=0, high=256
    )
    min_tokens_per_step: int = knob(
        1,
        "Tokens that a step writes at least (for unmask=threshold_strict, dynamic).",
        low=1,
        high=MAX_GEN_LENGTH,
        column=True,
    )
    penalty_lambda: float = knob(
        0.0,
        "Taken off the logit of the token to the left (for unmask=joint).",
        low=0,
        high=LOGIT_BIAS_BOUND,
    )
    max_denoising_steps: int = knob(
        48, "Most forwards of a canvas (for unmask=renoise).", low=1, high=MAX_STEPS, column=True
    )
    t_min: float = knob(
        0.4, "Temperature behind a canvas's last forward (renoise).", low=0, column=True
    )
    t_max: float = knob(0.8, "Temperature of its first (renoise).", low=0.001, column=True)
    stability_threshold: int = knob(
        1, "Forwards that a canvas has to stay the same (renoise).", low=0, high=64, column=True
    )
    confidence_threshold: float = knob(
        0.005, "Mean entropy in nats below which it is done (renoise).", low=0, column=True
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Refuse unknown keywords with the nearest name, which dataclasses would not do."""
        names = [f.name for f in fields(cls)]
        check_known(cls.__name__, kwargs, names)
        made = super().__new__(cls)
        # a preset must not overrule what was given, even where that is the default
        object.__setattr__(made, "_given", frozenset((*names[: len(args)], *kwargs)))
        # whoever gives gen_length by its place has to say something of max_tokens
        object.__setattr__(made, "_filler", len(args) > names.index("gen_length"))
        return made

    def __post_init__(self) -> None:
        if "_given" in self.__dict__:
            settle_length(self)
            self._fill()
        else:  # out of a message or a store: another process has done so
            object.__setattr__(self, "max_tokens", NotGiven(self.gen_length))
        names = ("block_length", "steps", "suffix_window", "cache", "unmask", "entropy_bound")
        filled = {name: getattr(self, name) for name in names}
        self._check_values()
        for name, value in filled.items():
            if isinstance(value, (NotGiven, Filled, Usual)):  # a model may have its own
                object.__setattr__(self, name, value)
        object.__setattr__(self, "stop", normal_stop(self.stop))
        object.__setattr__(self, "stop_token_ids", normal_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", normal_bias(self.logit_bias))
        object.__setattr__(self, "json_schema", normal_schema(self.json_schema))
        object.__setattr__(self, "choice", normal_choice(self.choice))
        if self.regex is not None and not isinstance(self.regex, str):
            raise InvalidParameterError(f"regex must be a text, got {self.regex!r}")
        if (why := next(refusals(self), None)) is not None:
            raise InvalidParameterError(why)

    def __deepcopy__(self, _: Any) -> SamplingParams:
        """Itself: nothing in it can be changed."""
        return self

    @property
    def length_name(self) -> str:
        """The name under which gen_length was given."""
        return "max_tokens" if rank(self.max_tokens) > rank(self.gen_length) else "gen_length"

    @property
    def constrained(self) -> bool:
        """True if the answer's text has to match something."""
        return not (self.regex is None and self.json_schema is None and self.choice is None)

    @property
    def edits(self) -> bool:
        """True if written tokens of a block may be replaced before the block is left."""
        return self.edit_threshold is not None

    @property
    def policy(self) -> str:
        """Name of the cache policy, "sparse" included."""
        return "sparse" if self.sparse is not None else self.cache

    @property
    def resolved_block_length(self) -> int:
        """Diffusion block length in tokens; the last block may be shorter."""
        if self.block_length is not None:
            return self.block_length
        return self.sparse.default_block_len if self.sparse is not None else self.gen_length

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, possibly empty."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _fill(self) -> None:
        """Fill fields that were not given: from the preset, and with what a rule has of its own."""
        if self.quality is not None:
            check_knobs(InvalidParameterError, self, "quality")
            if not isinstance(self.block_length, NotGiven):  # a check makes a plain number of it
                check_knobs(InvalidParameterError, self, "block_length")
        for name, value in filled(self, self.__dict__["_given"]).items():
            object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        check_knobs(InvalidParameterError, self)
        within = (None, None) if self.confidence == "neg_entropy" else (0.0, 1.0)
        threshold = check_float(InvalidParameterError, "threshold", self.threshold, *within)
        object.__setattr__(self, "threshold", threshold)
        if self.cache == "sparse":
            raise InvalidParameterError(
                "cache='sparse' is chosen by passing a SparseConfig: "
                "generate(prompts, params, sparse_configs=SparseConfig(...)), or on the command "
                "line by --sparse"
            )
        if self.sparse is not None and not isinstance(self.sparse, SparseConfig):
            raise InvalidParameterError(
                f"sparse must be a SparseConfig, got {self.sparse!r} ({type(self.sparse).__name__})"
            )
        if self.sparse is not None and not self.sparse.enabled:
            object.__setattr__(self, "sparse", None)
        # the names of other packages are looked up only if need be
        named = self.cache in CACHES and CACHES[self.cache].named
        known = CACHES if named else cache_names()
        cache = check_choice(InvalidParameterError, "cache", self.cache, known)
        object.__setattr__(self, "cache", cache)


#: the numbers that rules read, in the order that they have on the device
FLOATS = columns(SamplingParams)
