"""Names of everything that can be added: one line here and one new file.

The values are ``"module:attribute"`` strings, resolved on first use, so this
leaf module imports nothing and parameter validation can list valid names
without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: architectures[0] of config.json -> its class (a dllmserve.models.decoder.Decoder)
MODELS: dict[str, str] = {
    "LLaDAModelLM": "dllmserve.models.llada:Llada",
    "DreamModel": "dllmserve.models.dream:Dream",
}

#: SamplingParams.unmask -> rule class (dllmserve.decoding.rule.UnmaskRule)
UNMASK_RULES: dict[str, str] = {
    "steps": "dllmserve.decoding.steps:StepsRule",
    "threshold": "dllmserve.decoding.threshold:ThresholdRule",
    "factor": "dllmserve.decoding.factor:FactorRule",
    "entropy_bound": "dllmserve.decoding.entropy:EntropyBoundRule",
    "threshold_strict": "dllmserve.decoding.threshold_strict:StrictThresholdRule",
    "factor_strict": "dllmserve.decoding.factor_strict:StrictFactorRule",
    "hierarchy": "dllmserve.decoding.hierarchy:HierarchyRule",
    "credit": "dllmserve.decoding.credit:CreditRule",
    "klass": "dllmserve.decoding.klass:KlassRule",
    "wino": "dllmserve.decoding.wino:WinoRule",
}

#: rules that may mask written positions again: each forward runs a shadow of the block, and
#: nothing of a block is final before all of it is
REVOKING_RULES = frozenset({"wino"})
#: rules that compare distributions with those of the forward before, which are kept
HISTORY_RULES = frozenset({"klass"})
#: rules that keep something of logits, for which an engine reserves memory or not
KEEPING_RULES = HISTORY_RULES | {"credit"}
#: rules that do something to logits or keep something between forwards; they share segments
STATEFUL_RULES = REVOKING_RULES | KEEPING_RULES

#: cache policy name -> policy class (dllmserve.cache.policy.CachePolicy)
CACHE_POLICIES: dict[str, str] = {
    "none": "dllmserve.cache.none:NoCache",
    "prefix": "dllmserve.cache.dual:PrefixCache",
    "dual": "dllmserve.cache.dual:DualCache",
    "rolling": "dllmserve.cache.rolling:RollingCache",
    "delayed": "dllmserve.cache.delayed:DelayedCache",
    "drift": "dllmserve.cache.drift:DriftCache",
    "sparse": "dllmserve.cache.sparse:SparseCache",
}

#: attention backend name -> backend class (dllmserve.attention.backend.AttentionBackend)
ATTENTION_BACKENDS: dict[str, str] = {
    "sdpa": "dllmserve.attention.sdpa:SdpaBackend",
    "triton": "dllmserve.attention.triton:TritonBackend",
}


def resolve(table: dict[str, str], name: str) -> Any:
    """Import and return the object that ``table[name]`` points to.

    Raises:
        KeyError: ``name`` is not in the table; callers turn it into their own error.
    """
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
