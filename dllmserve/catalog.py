"""Catalogue of everything that can be added: models, unmask rules, cache policies, backends.

Each name leads to an entry: where the code is, and the traits that others need to know without
loading it. Code is imported on first use, so this module imports nothing heavy, and parameters can
be checked without torch.

Other packages add to it by entry points, which name an entry in a module without torch::

    [project.entry-points."dllmserve.rules"]
    leftmost = "my_package:LEFTMOST"     # LEFTMOST = RuleInfo("my_package.leftmost:LeftmostRule")

The groups are ``dllmserve.models``, ``dllmserve.rules``, ``dllmserve.caches`` and
``dllmserve.backends``. They are read when a name is asked for that is not ours, or all are; in a
server, by the API process and by the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar


@dataclass(frozen=True)
class Info:
    """Where something of the catalogue is.

    Attributes:
        path: "module:attribute".
    """

    path: str

    def load(self) -> Any:
        """Import it."""
        module, _, attribute = self.path.partition(":")
        return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class ModelInfo(Info):
    """A model, under ``architectures[0]`` of its config.json.

    The path leads to its class, a :class:`dllmserve.models.decoder.Decoder`.
    """


@dataclass(frozen=True)
class BackendInfo(Info):
    """An attention backend, a class like :class:`dllmserve.attention.backend.AttentionBackend`."""


@dataclass(frozen=True)
class EditInfo(Info):
    """A logit edit, a class like :class:`dllmserve.runtime.edits.LogitEdit`.

    Attributes:
        asked: "module:function" of ``(params, spec) -> pairs``: pairs of an integer and a number
            that a request gives the edit, none if it does not ask for it. "" leaves that to rules,
            which name the edit in their ``needs``.
        keeps: it keeps something of logits from forward to forward, for which an engine reserves
            memory or not.
        kernels: where its twin is that does the same in Triton kernels, if it has one.
    """

    asked: str = ""
    keeps: bool = False
    kernels: str = ""

    def of(self, kernels: str) -> Any:
        """The class, or its twin for kernels="triton"."""
        return Info(self.kernels).load() if self.kernels and kernels == "triton" else self.load()

    def pairs(self, params: Any, spec: Any) -> tuple[tuple[int, float], ...]:
        """What a request gives the edit."""
        return Info(self.asked).load()(params, spec) if self.asked else ()


@dataclass(frozen=True)
class RuleInfo(Info):
    """An unmask rule, a class like :class:`dllmserve.decoding.rule.UnmaskRule`.

    Attributes:
        needs: what it reads beside token and confidence: "entropy"; "back", the probability of
            written tokens, which a blind span of the block gives, so that the rule may mask them
            again; "noise", canvases of noise, each of which is decided as a whole; or the name of
            a logit edit: "kl", the divergence from the position's distribution in the block's last
            forward; "credit", which raises logits; "tempering", temperatures of a schedule.
        memory: what it keeps from forward to forward of a block: the numbers that a block begins
            with, for the request and for each position; None without a memory.
        confidence: what SamplingParams.confidence may be.
        quota: whether a schedule says how many positions each forward writes: "exact", so that the
            host knows the outcome, "least", or "" for a rule without one.
        edits: tokens that it has written may be replaced (``edit_threshold``).
    """

    needs: frozenset[str] = frozenset()
    memory: tuple[float, float] | None = None
    confidence: tuple[str, ...] = ("probability", "margin", "neg_entropy")
    quota: str = ""
    edits: bool = False

    @property
    def revokes(self) -> bool:
        """Written positions may be masked again, so a block is final when all of it is."""
        return "back" in self.needs

    @property
    def noise(self) -> bool:
        """It is for models whose canvas holds noise, and the only kind of rule for them."""
        return "noise" in self.needs

    @property
    def compares(self) -> bool:
        """Distributions of the block's last forward are kept."""
        return "kl" in self.needs

    @property
    def keeps(self) -> bool:
        """Something of the logits is kept, for which an engine reserves memory or not."""
        return any(EDITS[name].keeps for name in self.needs & {*EDITS})


@dataclass(frozen=True)
class CacheInfo(Info):
    """A cache policy, a class like :class:`dllmserve.cache.policy.CachePolicy`.

    Attributes:
        takes: the ``refresh_`` parameters that it reads.
        tracks: what is kept to tell which K,V are out of date: "written", when a position's token
            was, or "drift", how far its V moved; "" for nothing.
        whole: the K,V of the whole canvas are at hand, so that rules may mask tokens again.
        named: SamplingParams.cache may be it; "sparse" is chosen by a SparseConfig.
        grows: what it stores is final, so a request gets pages as it goes, and may have to give
            them back and compute their content anew. Others reserve all pages before they start.
        windowed: for block-causal and autoregressive models; others are for full attention.
        follows: which positions a forward computes depends on which are written, so none is
            planned before the report of the last.
        block: each forward that decides tokens computes the whole block, so that tokens of it may
            be edited.
    """

    takes: tuple[str, ...] = ()
    tracks: str = ""
    whole: bool = False
    named: bool = True
    grows: bool = False
    windowed: bool = False
    follows: bool = False
    block: bool = False


_Kind = TypeVar("_Kind", bound=Info)


class Catalog(Mapping[str, _Kind], Generic[_Kind]):
    """Names and entries of one kind: ours, then those of other packages by name.

    Args:
        what: the kind, for people.
        group: of the entry points.
        kind: what an entry point has to lead to.
        own: ours.

    Raises:
        KeyError: there is no such name.
        ConfigError: an entry point leads to something else, cannot be imported, or has a name
            that is taken.

    Example:
        >>> RULES["klass"].needs
        frozenset({'kl'})
    """

    def __init__(self, what: str, group: str, kind: type[_Kind], own: dict[str, _Kind]) -> None:
        self.own = own
        self._what, self._group, self._kind = what, group, kind
        self._added: dict[str, Any] | None = None
        self._loaded: dict[str, _Kind] = {}

    def __getitem__(self, name: str) -> _Kind:
        """The entry of a name."""
        if name in self.own:
            return self.own[name]
        if name not in self._loaded:
            point = self._points()[name]
            from dllmserve._plugins import load

            self._loaded[name] = load(self._what, point, self._kind)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is such an entry; what is not ours is not loaded."""
        return name in self.own or name in self._points()

    def __iter__(self) -> Iterator[str]:
        """All names, in an order that is the same in every process."""
        yield from self.own
        yield from self._points()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.own) + len(self._points())

    def index(self, name: str) -> int:
        """Place of a name in the order of all, the same in every process."""
        names = self.own if name in self.own else self
        return list(names).index(name)

    def at(self, index: int) -> _Kind:
        """The entry at a place."""
        names = self.own if index < len(self.own) else self
        return self[list(names)[index]]

    def _points(self) -> dict[str, Any]:
        """The entry points, by name."""
        if self._added is None:
            # takes 30 ms, which nobody needs who uses ours alone
            from dllmserve._plugins import added

            self._added = added(self._what, self._group, self.own)
        return self._added


class Made(dict[str, Any]):
    """One object for each name, made when it is first asked for.

    Example:
        >>> type(Made(CACHES)["none"]).__name__
        'NoCache'
    """

    def __init__(self, catalog: Catalog[Any]) -> None:
        super().__init__()
        self._catalog = catalog

    def __missing__(self, name: str) -> Any:
        """Make it."""
        self[name] = made = self._catalog[name].load()()
        return made


MODELS = Catalog(
    "model",
    "dllmserve.models",
    ModelInfo,
    {
        "LLaDAModelLM": ModelInfo("dllmserve.models.llada:Llada"),
        "DreamModel": ModelInfo("dllmserve.models.dream:Dream"),
        "DreamForCausalLM": ModelInfo("dllmserve.models.dream:DreamReasoner"),
        "ILLaDAForCausalLM": ModelInfo("dllmserve.models.illada:Illada"),
        "LLaDA2MoeModelLM": ModelInfo("dllmserve.models.llada2:Llada2"),
        "LLaDAMoEModelLM": ModelInfo("dllmserve.models.llada_moe:LladaMoe"),
        "DiffusionGemmaForBlockDiffusion": ModelInfo(
            "dllmserve.models.diffusion_gemma:DiffusionGemma"
        ),
        "SDARForCausalLM": ModelInfo("dllmserve.models.sdar:Sdar"),
        "SDARMoeForCausalLM": ModelInfo("dllmserve.models.sdar:SdarMoe"),
        "Fast_dLLM_QwenForCausalLM": ModelInfo("dllmserve.models.fast_dllm:FastDllm"),
        "StableDiffcoderForCausalLM": ModelInfo(
            "dllmserve.models.stable_diffcoder:StableDiffcoder"
        ),
        "NemotronLabsDiffusionModel": ModelInfo("dllmserve.models.nemotron:Nemotron"),
        "MinistralDiffEncoderModel": ModelInfo("dllmserve.models.nemotron:MinistralDiffEncoder"),
        "A2DLlamaLMHeadModel": ModelInfo("dllmserve.models.a2d:A2dLlama"),
        "A2DQwen2LMHeadModel": ModelInfo("dllmserve.models.a2d:A2dQwen2"),
        "A2DQwen3LMHeadModel": ModelInfo("dllmserve.models.a2d:A2dQwen3"),
        "LlamaForCausalLM": ModelInfo("dllmserve.models.llama:Llama"),
        "Qwen2ForCausalLM": ModelInfo("dllmserve.models.qwen:Qwen2"),
        "Qwen3ForCausalLM": ModelInfo("dllmserve.models.qwen:Qwen3"),
        "Qwen3MoeForCausalLM": ModelInfo("dllmserve.models.qwen:Qwen3Moe"),
    },
)

_PROBABILITY = ("probability",)
RULES = Catalog(
    "unmask rule",
    "dllmserve.rules",
    RuleInfo,
    {
        "steps": RuleInfo("dllmserve.decoding.steps:StepsRule", quota="exact"),
        "threshold": RuleInfo("dllmserve.decoding.threshold:ThresholdRule"),
        "factor": RuleInfo(
            "dllmserve.decoding.factor:FactorRule", confidence=("probability", "margin")
        ),
        "entropy_bound": RuleInfo(
            "dllmserve.decoding.entropy:EntropyBoundRule", needs=frozenset({"entropy"})
        ),
        "threshold_strict": RuleInfo(
            "dllmserve.decoding.threshold_strict:StrictThresholdRule", edits=True
        ),
        "factor_strict": RuleInfo(
            "dllmserve.decoding.factor_strict:StrictFactorRule",
            confidence=("probability", "margin"),
        ),
        "hierarchy": RuleInfo(
            "dllmserve.decoding.hierarchy:HierarchyRule", confidence=_PROBABILITY
        ),
        "credit": RuleInfo(
            "dllmserve.decoding.credit:CreditRule",
            needs=frozenset({"credit"}),
            confidence=_PROBABILITY,
        ),
        "klass": RuleInfo(
            "dllmserve.decoding.klass:KlassRule",
            needs=frozenset({"kl"}),
            memory=(0.0, 0.0),
            confidence=_PROBABILITY,
        ),
        "wino": RuleInfo(
            "dllmserve.decoding.wino:WinoRule",
            needs=frozenset({"back"}),
            # the number accepted in the forward before: at a block's start upstream's 30
            memory=(30.0, 0.0),
            confidence=_PROBABILITY,
        ),
        "sequential": RuleInfo("dllmserve.decoding.sequential:SequentialRule", quota="exact"),
        "dynamic": RuleInfo("dllmserve.decoding.dynamic:DynamicRule", quota="least", edits=True),
        "threshold_dinfer": RuleInfo("dllmserve.decoding.threshold_dinfer:DinferThresholdRule"),
        "joint": RuleInfo(
            "dllmserve.decoding.threshold_strict:StrictThresholdRule",
            confidence=_PROBABILITY,
            edits=True,
        ),
        "renoise": RuleInfo(
            "dllmserve.decoding.renoise:RenoiseRule",
            needs=frozenset({"noise", "entropy", "tempering"}),
            memory=(0.0, -1.0),
            confidence=_PROBABILITY,
        ),
    },
)

_REFRESHED = ("refresh_delay", "refresh_every", "refresh_window")
CACHES = Catalog(
    "cache policy",
    "dllmserve.caches",
    CacheInfo,
    {
        "none": CacheInfo("dllmserve.cache.none:NoCache", whole=True, block=True),
        "prefix": CacheInfo("dllmserve.cache.dual:PrefixCache", _REFRESHED, block=True),
        "dual": CacheInfo("dllmserve.cache.dual:DualCache", _REFRESHED, whole=True, block=True),
        "rolling": CacheInfo("dllmserve.cache.rolling:RollingCache", ("refresh_every",)),
        "delayed": CacheInfo(
            "dllmserve.cache.delayed:DelayedCache",
            ("refresh_delay", "refresh_every"),
            tracks="written",
        ),
        "drift": CacheInfo(
            "dllmserve.cache.drift:DriftCache", ("refresh_every", "refresh_share"), tracks="drift"
        ),
        "sparse": CacheInfo("dllmserve.cache.sparse:SparseCache", named=False),
        "paged": CacheInfo(
            "dllmserve.cache.paged:PagedCache",
            named=False,
            grows=True,
            windowed=True,
            block=True,
        ),
        "sub_block": CacheInfo(
            "dllmserve.cache.sub_block:SubBlockCache", windowed=True, follows=True
        ),
    },
)

#: in the order in which they are applied
EDITS = {
    "bias": EditInfo("dllmserve.runtime.edits:BiasEdit", "dllmserve.core.rows:bias_of"),
    "penalty": EditInfo("dllmserve.runtime.edits:PenaltyEdit", "dllmserve.core.rows:penalty_of"),
    "tempering": EditInfo("dllmserve.runtime.canvas:Tempering"),
    "credit": EditInfo("dllmserve.runtime.edits:CreditEdit", keeps=True),
    "kl": EditInfo("dllmserve.runtime.edits:KlObserver", keeps=True),
    "constraint": EditInfo(
        "dllmserve.runtime.constraints:ConstraintEdit",
        kernels="dllmserve.runtime.kernels.constraints:TritonConstraints",
    ),
}

BACKENDS = Catalog(
    "attention backend",
    "dllmserve.backends",
    BackendInfo,
    {
        "sdpa": BackendInfo("dllmserve.attention.sdpa:SdpaBackend"),
        "triton": BackendInfo("dllmserve.attention.triton:TritonBackend"),
    },
)
