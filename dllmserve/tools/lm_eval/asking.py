"""What lm-eval asks for, in this engine's words. Imports no lm-eval."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dllmserve._checks import check_known
from dllmserve._values import MAX_STOP_STRINGS
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError, InvalidParameterError
from dllmserve.sampling_params import SamplingParams
from dllmserve.tools.evaluation.settings import (
    SAMPLING_FIELDS,
    SPARSE,
    SPARSE_FIELDS,
    TOKENS_PER_STEP,
    Setting,
    make_setting,
)

#: lm-eval's own default for tasks that do not say how long an answer is
DEFAULT_GEN_LENGTH = 256
#: names of the length of an answer in a request, the first of which counts, as in lm-eval
LENGTHS = ("gen_length", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: what other models read, with the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "min_p": (0,),
    "use_cache": (True, False),
}
#: what lm-eval passes where nobody gave a device, GPU or not
_LM_EVAL_DEVICE = "cuda:0"
_ENGINE_SEED = "engine_seed"
_ENGINE_FIELDS = {
    _ENGINE_SEED if f.name == "seed" else f.name: f.name
    for f in fields(EngineConfig)
    if f.name != "model"
}


@dataclass(frozen=True)
class Ask:
    """One request, ready for the engine.

    Attributes:
        params: how it is decoded.
        until: texts that end the answer, all of them.
    """

    params: SamplingParams
    until: tuple[str, ...]

    def seeded(self, context: str, repeat: int) -> SamplingParams:
        """The parameters with a seed of the request's own, so that repeats differ.

        Args:
            context: the prompt.
            repeat: how often the same request came before.
        """
        if self.params.seed is None:
            return self.params
        text = f"{self.params.seed}:{repeat}:{context}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        return replace(self.params, seed=number)


def split_options(
    pretrained: str | None, model: str | None, device: str | None, options: Mapping[str, Any]
) -> tuple[EngineConfig, Setting]:
    """The engine and the way of decoding that ``--model_args`` ask for.

    Args:
        pretrained, model: two names of the checkpoint.
        device: of lm-eval's ``--device``; its default, "cuda:0", is a GPU if there is one.
        options: fields of EngineConfig, SamplingParams and SparseConfig; ``seed`` is the
            request's, ``engine_seed`` the engine's.

    Raises:
        UnknownOptionError, ConfigError, InvalidParameterError: one is wrong.
    """
    if pretrained is not None and model is not None and pretrained != model:
        raise ConfigError(f"give pretrained={pretrained!r} or model={model!r}, not both")
    known = (*_ENGINE_FIELDS, *SAMPLING_FIELDS, *SPARSE_FIELDS, SPARSE, TOKENS_PER_STEP)
    check_known("dllmserve (--model_args)", options, (*known, "pretrained", "model"))
    engine = {_ENGINE_FIELDS[k]: v for k, v in options.items() if k in _ENGINE_FIELDS}
    engine.setdefault("trust_remote_code", False)
    if device is not None:
        # on a machine with a GPU that is the first one, too
        engine.setdefault("device", "auto" if device == _LM_EVAL_DEVICE else device)
    decoding = {k: v for k, v in options.items() if k not in _ENGINE_FIELDS and v is not None}
    name = next((str(n) for n in (pretrained, model) if n is not None), EngineConfig.model)
    return EngineConfig(model=name, **engine), make_setting("model_args", decoding)


def read_request(given: Mapping[str, Any], base: Setting, spec: ModelSpec | None = None) -> Ask:
    r"""A request of the type generate_until.

    Args:
        given: its generation arguments.
        base: what ``--model_args`` say; the request's own come first.
        spec: of the model; None is one with full attention.

    Raises:
        UnknownOptionError, InvalidParameterError: an argument is wrong, or asks for what a
            diffusion model cannot do.

    Example:
        >>> ask = read_request({"until": ["\n"], "max_gen_toks": 32}, Setting("default"))
        >>> ask.params.gen_length, ask.params.temperature, ask.until
        (32, 0.0, ('\n',))
    """
    values = {k: v for k, v in given.items() if v is not None}
    until = _texts(values.pop("until", ())) + _texts(base.sampling.get("stop", ()))
    until += _texts(values.pop("stop", ()))
    for name, neutral in _NEUTRAL.items():
        if name in values and (value := values.pop(name)) not in neutral:
            raise InvalidParameterError(
                f"{name}={value!r} is not supported: leave it out of the task's generation_kwargs "
                f"or set it to {neutral[0]!r} by --gen_kwargs"
            )
    lengths = [values.pop(name) for name in LENGTHS if name in values]
    if lengths:
        values["gen_length"] = lengths[0]
    _sample(values, base)
    if values.get("top_k") == -1:
        values["top_k"] = 0  # how transformers and vLLM say "all"
    if until:
        # more than the engine takes are cut off afterwards, with the same text
        values["stop"] = until[:MAX_STOP_STRINGS]
    setting = make_setting("gen_kwargs", values, base)
    if spec is not None:
        setting = setting.on(spec)
    return Ask(setting.params(DEFAULT_GEN_LENGTH), tuple(until))


def cut(text: str, until: Sequence[str]) -> str:
    r"""The text before the first of the ends.

    Example:
        >>> cut("6 54 98\nSort", ["Q:", "\n"])
        '6 54 98'
    """
    places = [place for end in until if (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text


def _sample(values: dict[str, Any], base: Setting) -> None:
    """Turn do_sample into a temperature: greedy without it, and 1 if nobody says another."""
    sample = values.pop("do_sample", None)
    if sample is False:
        values["temperature"] = 0.0
    elif sample and "temperature" not in values:
        values["temperature"] = base.sampling.get("temperature") or 1.0


def _texts(given: Any) -> list[str]:
    """A text or several as a list, without empty ones, which would end every answer."""
    texts = [given] if isinstance(given, str) else list(given or ())
    return [text for text in texts if text]
