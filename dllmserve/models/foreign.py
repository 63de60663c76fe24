"""Directories that are no checkpoint of plain safetensors: what they are, and what can be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dllmserve._checks import is_broken_link

#: what downloads leave behind that were broken off
_UNFINISHED = ("*.incomplete", "*.part", "*.crdownload", "*.aria2")
#: where huggingface_hub keeps its own files when it downloads into a directory
_HUB_DOWNLOADS = ".cache/huggingface/download"
_CONVERT = "convert them to safetensors (transformers: model.save_pretrained(path))"
_ORIGINAL = "use the original checkpoint, with safetensors weights in F32, BF16 or F16"


def explain(directory: Path, *, unfinished_only: bool = False) -> str | None:
    """What a directory is that holds no weights to load.

    Args:
        directory: of which no safetensors file counts as the model's weights.
        unfinished_only: look for downloads that were broken off, and for nothing else.

    Returns:
        The rest of a sentence that begins with the directory; None if nothing is known of it.
    """
    kinds = (_unfinished,) if unfinished_only else _KINDS
    return next((reason for kind in kinds if (reason := kind(directory)) is not None), None)


def explain_file(path: Path) -> str:
    """What a file is that was given in place of a directory, as :func:`explain` says it."""
    kinds = {".gguf": "is a GGUF file, the format of llama.cpp", ".onnx": "is an ONNX file"}
    pickles = dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "is a file of pickled weights")
    kind = (kinds | pickles).get(path.suffix)
    if kind is None:
        return "is a file; give the directory that holds config.json"
    if path.suffix == ".gguf":
        return (
            f"{kind}; dllmserve convert {path.name} DIR writes the directory that holds "
            "config.json and safetensors, if its architecture is llama"
        )
    return f"{kind}; give the directory that holds config.json and safetensors weights"


def _unfinished(directory: Path) -> str | None:
    places = (directory, directory / _HUB_DOWNLOADS)
    left = [p.name for place in places for form in _UNFINISHED for p in place.glob(form)]
    if not left:
        return None
    return f"is a download that was broken off ({_some(left)}): run the download again"


def _empty(directory: Path) -> str | None:
    return None if any(directory.iterdir()) else "is empty"


def _broken(directory: Path) -> str | None:
    broken = [p.name for p in sorted(directory.iterdir()) if is_broken_link(p)]
    if not broken:
        return None
    return (
        f"holds links to files that are not there ({_some(broken)}); was a hub cache copied "
        "without its blobs? Copy it with links followed (cp -rL), or download it again"
    )


def _adapter(directory: Path) -> str | None:
    path = directory / "adapter_config.json"
    if not path.is_file() and not any(directory.glob("adapter_model.*")):
        return None
    settings: Any = None
    with suppress(OSError, ValueError):
        settings = json.loads(path.read_bytes())
    settings = settings if isinstance(settings, dict) else {}
    base = settings.get("base_model_name_or_path")
    kind = settings.get("peft_type") or "LORA"
    of = f" of {base!r}" if base else ""
    first = repr(base) if base else "BASE"
    return (
        f"is a PEFT adapter ({kind}){of}, not a whole model; merge the two and load the result: "
        f"PeftModel.from_pretrained(base, {str(directory)!r}).merge_and_unload()"
        f".save_pretrained(path), where base is AutoModel.from_pretrained({first})"
    )


def _gguf(directory: Path) -> str | None:
    names = [p.name for p in sorted(directory.glob("*.gguf"))]
    if not names:
        return None
    return (
        f"holds GGUF weights, the format of llama.cpp ({_some(names)}); {_ORIGINAL}, "
        f"or convert a llama model: dllmserve convert {names[0]} DIR"
    )


def _pickles(directory: Path) -> str | None:
    forms = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    names = [p.name for form in forms for p in sorted(directory.glob(form))]
    if not names:
        return None
    return (
        f"has only .bin or .pt weights ({_some(names)}), which can run code when loaded; {_CONVERT}"
    )


def _other_frameworks(directory: Path) -> str | None:
    forms = {
        "ONNX": ("*.onnx", "onnx/*.onnx"),
        "MLX": ("weights*.npz",),
        "TensorFlow": ("*.h5",),
        "Flax": ("*.msgpack",),
    }
    for name, patterns in forms.items():
        found = [p.name for form in patterns for p in sorted(directory.glob(form))]
        if found:
            return f"holds {name} weights ({_some(found)}); {_ORIGINAL}"
    return None


def _inner(directory: Path) -> str | None:
    """A hub cache, or the directory of a training run."""
    inside = sorted([*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")])
    if (directory / "config.json").exists() or not inside:
        return None
    places = [str(p.parent.relative_to(directory)) for p in inside]
    return f"holds no model itself, but these do: {_some(places)}; give one of them"


_KINDS: tuple[Callable[[Path], str | None], ...] = (
    _empty,
    _adapter,
    _unfinished,
    _gguf,
    _broken,
    _inner,
    _pickles,
    _other_frameworks,
)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
