"""A checkpoint's files: reading text and JSON as people have them, and finding the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllmserve._checks import is_broken_link
from dllmserve.errors import DllmServeError, WeightsError

_LFS = b"version https://git-lfs.github.com/spec/"
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
#: what training and other programs leave beside a checkpoint's own weights
_OTHERS = re.compile(r"(adapter_|consolidated|optimizer|scheduler|random_states|scaler)")


class NotText(ValueError):
    """A file that holds no UTF-8 text; the message says why, and what to do."""


def has_mark(path: Path) -> bool:
    """Whether a file begins with UTF-8's byte order mark.

    Raises:
        NotText: it is a git-lfs pointer, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _checked(path, file.read(len(_LFS))).startswith(_UTF8_MARK)
    except OSError as error:
        raise NotText(f"{path} cannot be read: {error.strerror or error}") from error


def _checked(path: Path, data: bytes) -> bytes:
    """The bytes that a file begins with, if they are not the note that git-lfs leaves."""
    if data.startswith(_LFS):
        raise NotText(
            f"{path} is a git-lfs pointer, not the file itself: run 'git lfs pull' in "
            f"{path.parent}, or download the file again"
        )
    return data


def read_bytes(path: Path) -> bytes:
    """A file of UTF-8 text, without a byte order mark.

    Raises:
        NotText: it is a git-lfs pointer or UTF-16, or cannot be read.
    """
    try:
        data = _checked(path, path.read_bytes())
    except OSError as error:
        raise NotText(f"{path} cannot be read: {error.strerror or error}") from error
    if data.startswith(_UTF16_MARKS):
        raise NotText(f"{path} is not UTF-8 text: it begins with UTF-16's mark; save it as UTF-8")
    return data.removeprefix(_UTF8_MARK)


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark. Raises NotText."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise NotText(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path, kind: type[DllmServeError]) -> Any:
    """What a JSON file holds.

    Args:
        path: of a file that is there.
        kind: of the error.
    """
    try:
        return json.loads(read_text(path))
    except NotText as error:
        what = "" if "git-lfs" in str(error) else f"{path} is not valid JSON: "
        raise kind(f"{what}{error}") from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON: {error}") from error


def read_object(path: Path, kind: type[DllmServeError]) -> dict[str, Any]:
    """The object that a JSON file must hold; see :func:`read_json`."""
    value = read_json(path, kind)
    if not isinstance(value, dict):
        raise kind(f"{path} must hold a JSON object")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model, chosen as transformers does.

    ``model.safetensors`` is the whole model whatever lies beside it. Without it the index
    names the files; without that, shards of one save are taken, or what other safetensors
    there are. Files that are not chosen are not looked at.

    Returns:
        Files that are there, and are no git-lfs pointers; empty if nothing looks like weights.

    Raises:
        WeightsError: files are missing, or it is another kind of checkpoint.
    """
    files = _chosen(directory)
    for path in files:
        try:
            has_mark(path)  # or it is a pointer
        except NotText as error:
            raise WeightsError(str(error)) from error
    if files:
        return files
    from dllmserve.models.foreign import explain

    if (reason := explain(directory)) is not None:
        raise WeightsError(f"{directory} {reason}")
    return []


def _chosen(directory: Path) -> list[Path]:
    whole = directory / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(directory, index)
    found = [p for p in sorted(directory.glob("*.safetensors")) if not is_broken_link(p)]
    shards = [p for p in found if _SHARD.fullmatch(p.name)]
    if shards:
        return _complete(directory, shards)
    return [p for p in found if not _OTHERS.match(p.name)]


def _indexed(directory: Path, index: Path) -> list[Path]:
    table = read_object(index, WeightsError).get("weight_map", {})
    values = table.values() if isinstance(table, dict) else []
    names = sorted({str(name) for name in values})
    if not names:
        raise WeightsError(f"{index} lists no weight files in its weight_map")
    _require(directory, names, "named by its index")
    return [directory / name for name in names]


def _complete(directory: Path, shards: list[Path]) -> list[Path]:
    """Shards without an index, if they are all of one save."""
    counts = {int(match[1]) for p in shards if (match := _SHARD.fullmatch(p.name))}
    if len(counts) > 1:
        raise WeightsError(
            f"{directory} has shards of several saves and no model.safetensors.index.json that "
            f"says which count: {', '.join(p.name for p in shards)}"
        )
    (count,) = counts
    wanted = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    _require(directory, wanted, "of its set of shards")
    return shards


def _require(directory: Path, names: list[str], which: str) -> None:
    absent = [name for name in names if not (directory / name).is_file()]
    if not absent:
        return
    reason = next(_reasons(directory, absent), "download them again")
    raise WeightsError(f"{directory} lacks weight files {which}: {', '.join(absent)}; {reason}")


def _reasons(directory: Path, absent: list[str]) -> Iterator[str]:
    from dllmserve.models.foreign import explain

    if any(is_broken_link(directory / name) for name in absent):
        yield "they are links to files that are not there (a hub cache copied without its blobs?)"
    if (reason := explain(directory, unfinished_only=True)) is not None:
        yield f"the directory {reason}"
