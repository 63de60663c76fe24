"""Loading: a name to a directory, config.json to a spec, safetensors to a decoder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dllmserve._checks import is_broken_link, user_path
from dllmserve.catalog import MODELS
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import (
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)
from dllmserve.kernels.e4m3 import Rows, Scaled
from dllmserve.layers.modules import Build, Part, put
from dllmserve.layers.ops import LayerOps
from dllmserve.models.config import MASK_FIELD
from dllmserve.models.decoder import Decoder
from dllmserve.models.dequantized import Dequantized
from dllmserve.models.files import read_object, weight_files
from dllmserve.models.quantized import FLOATS, check, tensors
from dllmserve.parallel.partition import Partition

#: Name of the model inside the package.
EMBEDDED = "tiny"
ASSETS = Path(__file__).parent.parent / "assets"
#: Inside the package too, as a bare config.json: the public checkpoints' shapes, for benchmarks.
SHAPES_ONLY = (
    "llada-8b",
    "dream-7b",
    "illada-8b",
    "sdar-4b",
    "sdar-8b",
    "fast-dllm-v2-7b",
    "qwen3-8b",
    "llada2-mini",
    "llada-moe-7b",
    "sdar-30b-a3b",
    "qwen3-30b-a3b",
    "diffusion-gemma-26b",
)
#: File patterns fetched for a hub id: never pickles, never code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
#: what can be wrong with the tensors of a checkpoint, and how many names of each are shown
_PROBLEMS = ("missing", "unexpected", "misshapen", "unusable")
_SHOWN = 6
#: far more than any model has; each is composed before its weights are counted
_MOST_LAYERS = 10_000
#: how config.json calls their number
_LAYER_FIELDS = ("num_hidden_layers", "n_layers")
#: fields of a ModelSpec that no model can do without
_POSITIVE = (
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_size",
    "max_model_len",
    "rope_theta",
    "norm_eps",
)


def find_model(model: str) -> Path:
    """Directory of a model: a name inside the package, a local directory, or a hub id.

    Raises:
        ModelNotFoundError: none of the three exists; the message says what was tried.
    """
    if model in (EMBEDDED, *SHAPES_ONLY):  # a directory of that name is ./tiny
        return ASSETS / model
    path = user_path(model)
    if path.is_dir():
        return path
    if path.exists():
        from dllmserve.models.foreign import explain_file

        raise ModelNotFoundError(f"{model!r} {explain_file(path)}")
    if is_broken_link(path):
        raise ModelNotFoundError(f"{model!r} is a link to {path.readlink()}, which is not there")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise ModelNotFoundError(
            f"no directory {model!r}; give a local directory, a hub id such as "
            f"'GSAI-ML/LLaDA-8B-Instruct', or {EMBEDDED!r} for the embedded model"
        )
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        # hub errors run over many lines; the first says what happened
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"no directory {model!r}, and it could not be fetched as a hub id: {reason}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict, with the end ids of generation_config.json merged in.

    Raises:
        ModelNotFoundError: there is none; the message says what the directory is instead.
        UnsupportedModelError: a file that is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        from dllmserve.models.foreign import explain

        weights = any(p.is_file() for p in directory.glob("model*.safetensors"))
        reason = None if weights else explain(directory)
        raise ModelNotFoundError(
            f"{directory} has no config.json: it {reason or 'is not a model directory'}"
        )
    config = read_object(path, UnsupportedModelError)
    extra = directory / "generation_config.json"
    if extra.is_file():
        generation = read_object(extra, UnsupportedModelError)
        merged: list[Any] = []
        for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
            merged += value if isinstance(value, list) else [] if value is None else [value]
        config["eos_token_id"] = merged  # eos_ids() checks them and drops doubles
    return config


def check_files(directory: Path, config: dict[str, Any]) -> None:
    """Raise WeightsError for a directory whose files say that it cannot be loaded.

    That is adapters, other formats, quantizations that are not read, git-lfs pointers and
    downloads that were broken off. A bare config.json passes: its sizes can be worked out.
    """
    check(directory, config, weight_files(directory))


def architecture_of(config: dict[str, Any]) -> type[Decoder]:
    """The class for ``architectures[0]``.

    The class name decides, not model_type: two architectures share "llada".
    """
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str) and names[0] in MODELS:
        architecture: type[Decoder] = MODELS[names[0]].load()
        return architecture
    what = "config.json has no 'architectures'"
    if isinstance(names, list) and names:
        what = f"architecture {names[0]!r} is not supported"
    raise UnsupportedModelError(f"{what}; supported architectures: {', '.join(sorted(MODELS))}")


def read_spec(config: dict[str, Any], options: EngineConfig | None = None) -> ModelSpec:
    """The ModelSpec of a config.json, checked for values no engine could use.

    Args:
        config: of the checkpoint.
        options: what they say of mask, ends and blocks goes before what config.json does.

    Raises:
        UnsupportedModelError: config.json lacks a field, or has one that cannot be.
        ConfigError: an option does not fit the model.
    """
    architecture = architecture_of(config)
    given = options or EngineConfig()
    if given.mask_id is not None:
        config = config | {MASK_FIELD: given.mask_id}
    if given.eos_ids is not None:
        config = config | {"eos_token_id": list(given.eos_ids)}
    if given.layers is not None:
        inner = config.get("text_config")
        cut = _first_layers(config, given.layers)
        if isinstance(inner, dict):
            cut["text_config"] = inner | _first_layers(inner, given.layers)
        config = config | cut
    try:
        spec = architecture.read(config)
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedModelError(
            f"config.json has a value of a wrong type or size: {error}"
        ) from error
    spec = _with_options(spec, given)
    _check(spec)
    try:
        return replace(spec, weights=count_weights(Partition(spec)))
    except (RuntimeError, OverflowError) as error:
        raise UnsupportedModelError(
            f"config.json has sizes that no memory could hold: {error}"
        ) from error


def _check(spec: ModelSpec) -> None:
    """Raise UnsupportedModelError on numbers that no engine could use."""
    for name in _POSITIVE:
        value, most = getattr(spec, name), _MOST_LAYERS if name == "num_layers" else sys.maxsize
        if not 0 < value <= most:
            raise UnsupportedModelError(
                f"config.json: {name} is {value}; it must be over 0 and at most {most}"
            )
    if spec.geometry != "full" and spec.block_length < 1:
        raise UnsupportedModelError(
            f"the block size is {spec.block_length}; it must be over 0: give default_block_length "
            "(--default-block-length)"
        )
    if spec.rotated % 2:
        field = "rotary_dim" if spec.rotary_dim else "head_dim"
        raise UnsupportedModelError(f"{field}={spec.rotated} is odd, so it cannot be rotated")
    if spec.embedding_size < spec.vocab_size:
        raise UnsupportedModelError(
            f"embedding_size={spec.embedding_size} is under vocab_size={spec.vocab_size}"
        )
    masks = spec.geometry != "causal" and not spec.noise
    if masks and not 0 <= spec.mask_id < spec.embedding_size:
        raise UnsupportedModelError(
            f"mask_token_id={spec.mask_id} is outside the {spec.embedding_size} embeddings: give "
            "mask_id (--mask-id)"
        )


def _first_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The number of layers under its names, of so many layers alone."""
    names = [name for name in _LAYER_FIELDS if isinstance(config.get(name), int)]
    for name in names:
        if config[name] < layers:
            raise ConfigError(f"layers={layers} is over the {config[name]} that the model has")
    return dict[str, Any].fromkeys(names, layers)


def _with_options(spec: ModelSpec, given: EngineConfig) -> ModelSpec:
    """The spec with what the engine's options say of mask, ends and blocks."""
    mask, block, ends = given.mask_id, given.default_block_length, given.eos_ids
    if spec.geometry == "causal":
        for option, value, why in (
            ("mask_id", mask, "has no mask"),
            ("default_block_length", block, "writes one token after the other"),
        ):
            if value is not None:
                raise ConfigError(
                    f"{option}={value} does not work with an autoregressive model, which {why}: "
                    "leave it out"
                )
    if spec.noise and mask is not None:
        raise ConfigError(
            f"mask_id={mask} does not work with a model that fills canvases of random ids, which "
            "have no mask: leave it out"
        )
    window = 0 if spec.experts is None else spec.experts.window
    if window and block not in (None, window):
        raise ConfigError(
            f"default_block_length={block} does not work with a model whose experts are chosen for "
            f"blocks of {window}: leave it out"
        )
    most = f"the model's ids are 0..{spec.embedding_size - 1}"
    if mask is not None and mask >= spec.embedding_size:
        raise ConfigError(f"mask_id={mask} has no embedding: {most}")
    spec = replace(
        spec,
        mask_id=spec.mask_id if mask is None else mask,
        block_length=block or spec.block_length,
        eos_ids=spec.eos_ids if ends is None else tuple(ends),
    )
    for end in ends or ():
        if end >= spec.embedding_size:
            raise ConfigError(f"eos_ids has {end}, which has no embedding: {most}")
        if end == spec.mask_id:
            raise ConfigError(f"eos_ids has {end}, the mask, which no answer holds: leave it out")
    return spec


def outline(partition: Partition, quantization: str | None = None) -> Decoder:
    """A rank's decoder without memory: its weights have shapes, and nothing can be computed."""
    ops = LayerOps(2, 1.0, 0, torch.device("cpu"))
    return _compose(Build(partition, torch.bfloat16, torch.device("meta"), ops, quantization))


def count_weights(partition: Partition) -> int:
    """Numbers in all weights of a rank."""
    return sum(weight.numbers for weight in outline(partition).weights)


def count_quantized(partition: Partition, quantization: str | None) -> tuple[int, int]:
    """Numbers in a rank's quantized weights, and rows, each of which has a factor."""
    found = [weight.data for weight in outline(partition, quantization).weights]
    narrow = [data for data in found if isinstance(data, Scaled)]
    return sum(w.data.numel() for w in narrow), sum(w.scale.numel() for w in narrow)


def empty_decoder(
    partition: Partition,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    kernels: str = "torch",
    quantization: str | None = None,
) -> Decoder:
    """A rank's decoder, with weights that are not initialised.

    Args:
        partition: the model's dimensions, the ranks, and this rank's share.
        dtype, device: of the weights.
        max_len: positions that the rotary tables cover.
        kernels: "torch" or "triton", see :mod:`dllmserve.layers.ops`.
        quantization: "fp8" for matrices in eight bits, None for none.
    """
    spec = partition.spec
    kind = LayerOps
    if kernels == "triton":
        from dllmserve.layers.triton import TritonOps

        kind = TritonOps
    ops = kind(spec.rotated, spec.rope_theta, max_len, device, spec.rope_scaling)
    return _compose(Build(partition, dtype, device, ops, quantization))


def _compose(build: Build) -> Decoder:
    decoder: Decoder = MODELS[build.spec.architecture].load()(build)
    return decoder


def load_decoder(directory: Path, partition: Partition, **options: Any) -> Decoder:
    """Build a rank's decoder and fill it from the directory's safetensors.

    Only what the rank holds is read; quantized weights are dequantised meanwhile, see
    :mod:`dllmserve.models.quantized`.

    Args:
        directory: of the checkpoint.
        partition: the model's dimensions, and the rank's share of them.
        options: as for :func:`empty_decoder`.

    Raises:
        WeightsError: names every missing, unexpected or misshapen tensor, or the file
            that could not be read.
    """
    files = _weight_files(directory)
    decoder = empty_decoder(partition, **options)
    places: dict[str, list[tuple[Part, Rows]]] = {}
    for weight in decoder.weights:
        for part, rows in weight.places():
            places.setdefault(part.name, []).append((part, rows))
    problems: dict[str, list[str]] = {kind: [] for kind in _PROBLEMS}
    seen: set[str] = set()
    for name, tensor in tensors(read_config(directory), files):
        if name not in places:
            if not (any(part in name for part in decoder.ignored) or _adds_nothing(name, tensor)):
                problems["unexpected"].append(name)
            continue
        expected = places[name][0][0].shape
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if name in seen:
            problems["unusable"].append(f"{name} is in more than one file")
        elif shape != expected:
            problems["misshapen"].append(f"{name} is {shape}, expected {expected}")
        elif kind not in FLOATS:
            # they come with scales that nothing has applied
            problems["unusable"].append(f"{name} is {kind}, expected F32, BF16 or F16")
        else:
            for part, rows in places[name]:
                if rows.shape.numel():
                    _take(rows, name, tensor, part.cut)
        seen.add(name)
    problems["missing"] = [name for name in places if name not in seen]
    _report(directory, problems)
    return decoder


def require_weights(directory: Path) -> None:
    """Raise WeightsError for a name inside the package that stands for shapes alone."""
    if directory.parent == ASSETS and directory.name in SHAPES_ONLY:
        raise WeightsError(
            f"{directory.name!r} is the shapes of a public checkpoint without its weights: use "
            "load_format='dummy' for random ones, or give the checkpoint's hub id or directory "
            f"(./{directory.name} if it has that name)"
        )


def _weight_files(directory: Path) -> list[Path]:
    require_weights(directory)
    files = weight_files(directory)
    if not files:
        raise WeightsError(
            f"{directory} has no .safetensors weights (use load_format='dummy' for random ones)"
        )
    return files


def _read(name: str, tensor: Any, index: tuple[slice, ...]) -> Tensor:
    """What a rank wants of a tensor."""
    try:
        part: Tensor = tensor[index]
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{name} cannot be read (truncated or corrupt?): {error}") from error
    return part


def _take(to: Rows, name: str, tensor: Any, cut: tuple[slice, ...]) -> None:
    """Fill rows with a part of a tensor; what is in e4m3, and is to be, stays as it is."""
    if isinstance(to, Scaled) and isinstance(tensor, Dequantized):
        stored = tensor.scaled(cut)
        if stored is not None:
            to.data.copy_(stored[0])
            to.scale.copy_(stored[1])
            return
    put(to, _read(name, tensor, cut))


def _adds_nothing(name: str, tensor: Any) -> bool:
    """Whether it is a bias of zeros, as AutoGPTQ has written for matrices that have none."""
    if not name.endswith(".bias") or tensor.get_dtype() not in FLOATS:
        return False
    return not bool(_read(name, tensor, tuple(slice(n) for n in tensor.get_shape())).any())


def _report(directory: Path, problems: dict[str, list[str]]) -> None:
    """Raise WeightsError with every kind of problem that has names."""
    parts = []
    for label, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{label}: {', '.join(names[:_SHOWN])}{more}")
    if parts:
        raise WeightsError(
            f"the tensors of {directory} do not match its config.json; {'; '.join(parts)}"
        )
