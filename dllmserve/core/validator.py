"""RequestValidator: every check that a request can fail before it is queued. No torch, no weights.

The engine and the processes that talk to it hold requests against the same checks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllmserve._combinations import editing
from dllmserve._lengths import DEFAULT_LENGTHS
from dllmserve._values import Filled, NotGiven, rank
from dllmserve.catalog import CACHES, RULES
from dllmserve.constraints.compiled import Compiled
from dllmserve.core.canvas import Canvas, answer_canvas, framed_canvas, window_canvas
from dllmserve.core.constrained import regions_of
from dllmserve.core.infill import hole_canvas, row_length, template_params
from dllmserve.core.limits import Limits
from dllmserve.core.model_spec import ModelSpec
from dllmserve.core.request import Request
from dllmserve.core.rows import written_last
from dllmserve.errors import ContextLengthError, InvalidParameterError, PromptError
from dllmserve.holes import Holes
from dllmserve.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestValidator:
    """The checks of one engine.

    Attributes:
        spec: the model.
        limits: the engine's sizes.
        has_tokenizer: whether answers have a text.
    """

    spec: ModelSpec
    limits: Limits
    has_tokenizer: bool

    def request(
        self,
        id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        holes: Holes = (),
        seed: int = 0,
        watch: bool = False,
        stream: bool = False,
        owner: str = "",
        candidates: tuple[tuple[int, ...], ...] = (),
        trace: bool = False,
        canvas: Canvas | None = None,
        name: str = "prompt",
        grammars: Sequence[Compiled | None] = (),
    ) -> Request:
        """A checked request.

        Args:
            id, seed, watch, stream, owner, candidates, trace: the request's.
            prompt_ids: token ids, integers of any kind; with holes, those of the whole row.
            params: how it is decoded.
            holes: what is filled; without any, an answer behind the prompt.
            canvas: what is filled, of a model of this geometry, if it is neither; its ids are the
                prompt_ids.
            name: of the prompt, in errors.
            grammars: what each hole of the canvas has to match; see :func:`regions_of`.

        Raises:
            PromptError, ContextLengthError, InvalidParameterError, CapacityError.
        """
        if holes:
            params = self._of_row(prompt_ids, holes, params, name)
        params = settled(params, self.spec)
        own = canvas is None
        ids = self._ids(prompt_ids, holes, params, name) if own else self._known(prompt_ids, name)
        self._check(params)
        request = Request(
            id=id,
            canvas=replace(canvas, ids=ids) if canvas else self._canvas(ids, holes, params, name),
            holes=holes,
            params=params,
            seed=seed,
            watch=watch,
            stream=stream,
            owner=owner,
            candidates=candidates,
            trace=trace,
            grammars=tuple(grammars),
        )
        request.regions = regions_of(request, grammars)
        self._check_whole_blocks(request, name)
        _check_candidates(request, self.spec)
        policy = CACHES[request.policy].load()()
        if reasons := policy.unsupported(self.spec):
            raise InvalidParameterError(f"cache {request.policy!r}: {'; '.join(reasons)}")
        self.limits.check(request, policy.slots(request, self.spec))
        return request

    def _known(self, ids: Sequence[int], name: str) -> list[int]:
        """Ids as plain ints, masks among them."""
        return _checked_ids(ids, self.spec, name)

    def given(self, ids: Sequence[int], name: str) -> list[int]:
        """Given tokens as plain ints.

        Raises:
            PromptError: there are none, one is outside the vocabulary, or one is the mask.
        """
        if not ids:
            raise PromptError(f"{name} is empty: give at least one token")
        found = _checked_ids(ids, self.spec, name)
        _check_masks(found, (), self.spec, name)
        return found

    def _canvas(self, ids: list[int], holes: Holes, params: SamplingParams, name: str) -> Canvas:
        """The prompt and an answer behind it, in blocks as the model's geometry wants them."""
        if holes:
            return hole_canvas(ids, holes, params, self.spec, name)
        spec, length, block = self.spec, params.gen_length, params.resolved_block_length
        if spec.geometry == "full":
            return answer_canvas(ids, length, block)
        if spec.causal_context:
            return framed_canvas(ids, length, block, whole=spec.noise)
        part, short = params.sub_block_length, spec.short_blocks
        return window_canvas(ids, length, block, spec.logit_shift, part, short=short)

    def _check_geometry(self, params: SamplingParams) -> None:
        """Refuse what block-causal and autoregressive models have no use for, or cannot do."""
        spec = self.spec
        self._check_noise(params)
        self._check_cache(params)
        self._check_edits(params)
        if spec.geometry == "full":
            if params.sub_block_length is not None:
                raise InvalidParameterError(
                    f"sub_block_length={params.sub_block_length} cuts the blocks of block-causal "
                    "models, and this one has full attention: use block_length"
                )
            return
        self._check_windows(params)
        kind = self._kind
        if params.schedule != "uniform":
            raise InvalidParameterError(
                f"schedule={params.schedule!r} spreads steps over the whole answer, and {kind} "
                "takes steps_per_block in each block: leave it out"
            )
        if params.cfg_scale > 0:
            raise InvalidParameterError(
                f"cfg_scale={params.cfg_scale:g} does not work with {kind}: a second row would "
                "need K,V of a prompt without content, which such models are not trained on"
            )
        asked = {"suffix_window": params.suffix_window is not None, "early_end": params.early_end}
        for name in asked:
            if asked[name]:
                raise InvalidParameterError(
                    f"{name} leaves out what stands behind a block, and {kind} sees nothing of "
                    "that: leave it out"
                )
        if RULES[params.unmask].revokes:
            raise InvalidParameterError(
                f"unmask={params.unmask!r} reads K,V of positions behind the block, and {kind} has "
                "none: use another rule"
            )
        for name in ("block_length", "sub_block_length"):
            if spec.geometry == "causal" and getattr(params, name) not in (None, 1):
                raise InvalidParameterError(
                    f"{name}={getattr(params, name)} does not work with {kind}, which writes one "
                    "token after the other: leave it out"
                )

    def _check_noise(self, params: SamplingParams) -> None:
        """Refuse rules that fill masks where there are none, and the other way round."""
        spec, rule = self.spec, params.unmask
        if RULES[rule].noise != spec.noise:
            raise InvalidParameterError(
                f"unmask={rule!r} fills masks, and this model has a canvas of noise: leave it out "
                "or take 'renoise'"
                if spec.noise
                else f"unmask={rule!r} works on a canvas of noise, and this model has masks: take "
                "another rule"
            )
        if not spec.noise:
            return
        if params.steps_per_block is not None:
            raise InvalidParameterError(
                f"steps_per_block={params.steps_per_block} is a fixed schedule's, and a canvas of "
                "noise is done when it is sure: give max_denoising_steps"
            )
        if params.resolved_block_length > spec.block_length:
            raise InvalidParameterError(
                f"block_length={params.block_length} is over this model's canvas of "
                f"{spec.block_length} tokens: make it smaller, or leave it out"
            )

    def _check_windows(self, params: SamplingParams) -> None:
        """Refuse what computes parts of the blocks that a model's experts are chosen for."""
        window = 0 if self.spec.experts is None else self.spec.experts.window
        if window and params.block_length != window:
            raise InvalidParameterError(
                f"block_length={params.block_length} does not work with a model whose experts are "
                f"chosen for blocks of {window}: leave it out"
            )
        if window and params.policy == "sub_block":
            raise InvalidParameterError(
                f"cache='sub_block' computes parts of blocks, and this model's experts are chosen "
                f"for a whole block of {window}: leave it out"
            )

    def _check_edits(self, params: SamplingParams) -> None:
        """Refuse edits where a forward does not compute the whole block again."""
        if not params.edits or self.spec.geometry == "full":
            return
        if self.spec.geometry == "causal" or self.spec.logit_shift or self.spec.causal_context:
            why = (
                "which writes one token after the other"
                if self.spec.geometry == "causal"
                else "whose first token of a block is decided with the block before"
            )
            raise InvalidParameterError(
                f"{editing(params)} replaces tokens of a block, and this is {self._kind} {why}: "
                + ("take another rule" if params.unmask == "joint" else "leave it out")
            )

    @property
    def _kind(self) -> str:
        """The model, as errors call it."""
        return {
            "full": "a model with full attention",
            "block": "a block-causal model",
            "causal": "an autoregressive model",
        }[self.spec.geometry]

    def _check_cache(self, params: SamplingParams) -> None:
        """Refuse caches of another geometry, and sub-blocks that do not fill their block."""
        windowed = CACHES[params.policy].windowed
        if params.sub_block_length is not None and self.spec.causal_context:
            raise InvalidParameterError(
                f"sub_block_length={params.sub_block_length} cuts blocks, and this model fills a "
                "block as a whole: leave it out"
            )
        if windowed and self.spec.geometry != "block":
            raise InvalidParameterError(
                f"cache={params.policy!r} keeps K,V of a block that a block-causal model fills, "
                f"and this is {self._kind}: leave it out"
            )
        if self.spec.geometry != "full" and not windowed and params.policy != "none":
            given = "sparse attention" if params.sparse else f"cache={params.policy!r}"
            raise InvalidParameterError(
                f"{given} approximates full attention, and this is {self._kind}, whose K,V are "
                "exact in any case: leave it out"
            )
        length, part = params.resolved_block_length, params.sub_block_length
        if self.spec.geometry == "block" and part and part > length:
            raise InvalidParameterError(
                f"sub_block_length={part} is to be a part of a block of {length}: make it smaller"
            )
        if windowed and part and length % part:
            raise InvalidParameterError(
                f"cache={params.policy!r} needs sub-blocks that fill a block of {length}: "
                f"sub_block_length={part} does not divide it"
            )

    def _ids(
        self, prompt: Sequence[int], holes: Holes, params: SamplingParams, name: str
    ) -> list[int]:
        """The ids of a prompt, or of a row with holes."""
        if not prompt and not holes:
            raise PromptError(f"{name} is empty: give at least one token")
        if not holes and len(prompt) >= self.limits.max_model_len:
            # before anything looks at every token
            self._check_length(len(prompt), params, name)
        ids = _checked_ids(prompt, self.spec, name)
        _check_masks(ids, holes, self.spec, name)
        if not holes:
            self._check_length(len(ids), params, name)
        return ids

    def _check_length(self, tokens: int, params: SamplingParams, name: str) -> None:
        limit = self.limits.max_model_len
        total = tokens + params.gen_length
        if total > limit:
            raise ContextLengthError(
                f"{name} has {tokens} tokens and {params.length_name} is {params.gen_length}: "
                f"{total} together, over max_model_len={limit}: shorten one of them"
                f"{_raise_it(limit, self.spec)}"
            )

    def _of_row(
        self, ids: Sequence[int], holes: Holes, params: SamplingParams, name: str
    ) -> SamplingParams:
        """Parameters of a request that fills holes of a row, which has to fit."""
        limit, length = self.limits.max_model_len, row_length(ids, holes)
        if length > limit:
            raise ContextLengthError(
                f"{name} has {length} positions, its holes among them, over max_model_len={limit}: "
                f"shorten it{_raise_it(limit, self.spec)}"
            )
        return template_params(params, holes, length, self.spec)

    def _check_whole_blocks(self, request: Request, name: str) -> None:
        """Refuse a canvas that is over the limit because its last block is filled to its end."""
        canvas, limit = request.canvas, self.limits.max_model_len
        if len(canvas) <= limit:
            return
        window, origin = canvas.unit, canvas.origin
        room = origin + (limit - origin) // window * window - canvas.start
        short = len(canvas) - limit if canvas.frame else 1 - room
        way = (
            "shorten it by a block"
            if request.holes
            else f"{request.params.length_name} may be {room} at most"
            if room > 0
            else f"shorten {name} by {short} tokens, or take a shorter block_length"
        )
        raise ContextLengthError(
            f"{name} and its answer fill {len(canvas)} positions in blocks of {window}, over "
            f"max_model_len={limit}: {way}{_raise_it(limit, self.spec)}"
        )

    def _check_ends(self, params: SamplingParams) -> None:
        """Refuse what the model has no ids for: it would change nothing."""
        if params.logits_eos_inf and not self.spec.text_end_ids:
            raise InvalidParameterError(
                "logits_eos_inf=True needs a model with an id that ends the text, and this one "
                "has none: leave it out"
            )
        if params.confidence_eos_eot_inf and not written_last(params, self.spec):
            what = "text or a turn" if params.temperature == 0 else "turn"
            why = "" if params.temperature == 0 else f" at temperature={params.temperature:g}"
            raise InvalidParameterError(
                f"confidence_eos_eot_inf=True needs a model with an id that ends a {what}{why}, "
                "and this one has none: leave it out"
            )

    def _check(self, params: SamplingParams) -> None:
        self._check_ends(params)
        self._check_geometry(params)
        if params.stop_strings and not self.has_tokenizer:
            raise InvalidParameterError("stop needs a tokenizer, and this checkpoint has none")
        for name in ("stop_token_ids", "logit_bias"):
            largest = max(getattr(params, name) or (0,))
            if largest >= self.spec.vocab_size:
                raise InvalidParameterError(
                    f"{name} has token id {largest}, outside the vocabulary "
                    f"0..{self.spec.vocab_size - 1}"
                )


def settled(params: SamplingParams, spec: ModelSpec) -> SamplingParams:
    """Parameters with what depends on the model where nobody gave it.

    Block-causal models have a block length of their own, and no use for caches; those with full
    attention have one if the engine's options say so. An autoregressive model's answer has
    ``max_tokens``, whose default is not gen_length's.
    """
    block, changed = params.block_length, dict[str, Any]()
    given = block is not None and not isinstance(block, NotGiven)
    if spec.block_length and not given and params.sparse is None:  # which has one of its own
        changed["block_length"] = spec.block_length
        if isinstance(params.steps, NotGiven) and spec.geometry == "full":
            from dllmserve.presets import same_pace  # where such steps come from

            changed["steps"] = same_pace(params.steps, params.gen_length, block, spec.block_length)
    if spec.geometry != "full":
        changed |= _without_full_attention(params, spec)
    if spec.noise and isinstance(params.unmask, Filled):
        changed["unmask"] = "renoise"
    if spec.geometry == "causal" and not (rank(params.gen_length) or rank(params.max_tokens)):
        changed["max_tokens"] = int(DEFAULT_LENGTHS[0])
    return replace(params, **changed) if changed else params


def _without_full_attention(params: SamplingParams, spec: ModelSpec) -> dict[str, Any]:
    """What a preset, or a default, says of full attention alone."""
    changed = dict[str, Any]()
    if isinstance(params.cache, Filled):
        changed["cache"] = "none"
    if isinstance(params.suffix_window, NotGiven):
        changed["suffix_window"] = None
    if params.quality is not None:
        changed["early_end"] = False
        if spec.geometry == "causal" and not (RULES[params.unmask].revokes or params.edits):
            changed["unmask"] = "steps"  # writes the same, and is known beforehand
    if params.steps != SamplingParams.steps:
        # one a token is what it takes anyway
        fewer = params.steps < params.gen_length and not isinstance(params.steps, NotGiven)
        if fewer and params.steps_per_block is None:
            raise InvalidParameterError(
                f"steps={params.steps} counts for the whole answer of a model with full attention, "
                "and this one fills block after block: give "
                + ("max_denoising_steps" if spec.noise else "steps_per_block")
                if spec.geometry == "block"
                else f"steps={params.steps} says nothing to an autoregressive model, which takes a "
                "forward for each token: leave it out"
            )
        changed["steps"] = SamplingParams.steps
    return changed


def _check_candidates(request: Request, spec: ModelSpec) -> None:
    """Refuse candidates that are not those of each position to fill."""
    given, fills = request.candidates, sum(request.masks)
    if not given:
        return
    if spec.noise:
        raise InvalidParameterError(
            "candidates are read where nothing is written yet, and this model has no masks: its "
            "canvas holds noise"
        )
    if len(given) != fills:
        raise InvalidParameterError(
            f"candidates has {len(given)} tuples for {fills} positions to fill: give one for each"
        )
    outside = [i for ids in given for i in ids if not 0 <= i < spec.embedding_size]
    if outside:
        raise InvalidParameterError(
            f"candidates has token id {outside[0]}, outside the LM head's "
            f"0..{spec.embedding_size - 1}"
        )


def _raise_it(limit: int, spec: ModelSpec) -> str:
    """The other way out, if the model has more positions than the engine was given."""
    most = spec.max_model_len
    return f", or raise max_model_len up to the model's {most}" if limit < most else ""


def window_of(spec: ModelSpec, params: SamplingParams) -> int:
    """Positions to whose multiple a canvas is filled; 0 with full attention.

    They are counted from position 0 on, or of canvases of noise from the prompt's end on.
    """
    if spec.geometry == "full":
        return 0
    if spec.short_blocks or (spec.causal_context and not spec.noise):
        return 1
    given = None if isinstance(params.block_length, NotGiven) else params.block_length
    return given or spec.block_length


def room_of(spec: ModelSpec, params: SamplingParams, prompt_len: int, room: int) -> int:
    """Positions, of so many that there is room for, up to which answers can be filled."""
    window, origin = window_of(spec, params) or 1, prompt_len if spec.noise else 0
    return origin + max(room - origin, 0) // window * window


def _check_masks(ids: Sequence[int], holes: Holes, spec: ModelSpec, name: str) -> None:
    """Refuse the mask among given tokens: whoever writes it wants something filled in."""
    if spec.mask_id not in ids:
        return
    open_ = {p for start, hole in holes for p in range(start, start + hole.length)}
    found = [p for p, token in enumerate(ids) if token == spec.mask_id and p not in open_]
    if found:
        raise PromptError(
            f"{name} has the model's mask token, {spec.mask_id}, at position {found[0]}, and given "
            "tokens are not filled in: use LLM.infill (over HTTP /v1/infill) with a Hole there"
        )


def _checked_ids(ids: Sequence[int], spec: ModelSpec, name: str) -> list[int]:
    """The ids as plain ints (numpy integers are welcome), or an error that says where."""
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < spec.vocab_size:
        return list(ids)  # nearly always; what follows takes ten times as long
    checked = []
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise PromptError(f"{name}[{index}] must be an integer token id, got {token!r}")
        if not 0 <= token < spec.vocab_size:
            raise PromptError(
                f"{name}[{index}] is {token}, outside the vocabulary 0..{spec.vocab_size - 1}"
            )
        checked.append(operator.index(token))
    return checked
