"""Tokenizers without a tokenizer.json, through transformers, which takes seconds to import."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dllmserve.config import CODE_VARIABLE, remote_code_forbidden
from dllmserve.engine.codec import Codec
from dllmserve.engine.own_code import load_by_own_code
from dllmserve.engine.token_files import TokenFiles
from dllmserve.errors import TokenizerError
from dllmserve.models.files import NotText, has_mark, read_bytes, read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken

#: files of text that a tokenizer is made of
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.tiktoken")


def load_other(directory: Path, files: TokenFiles, trust: bool) -> tuple[Codec, dict[str, str]]:
    """The codec, and the variables of its chat templates.

    Args:
        directory: of the checkpoint.
        files: as read from it.
        trust: whether the tokenizer's own code may run if nothing else can load it.

    Raises:
        TokenizerError: it cannot be loaded.
    """
    with _readable(directory) as place:
        tokenizer = _load(place, directory, files, trust)
    if not hasattr(tokenizer, "special_tokens_map"):  # RagTokenizer is two of them
        kind = type(tokenizer).__name__
        raise TokenizerError(f"the tokenizer of {directory} is a {kind}, which is not supported")
    names = {k: v for k, v in dict(tokenizer.special_tokens_map).items() if isinstance(v, str)}
    if getattr(tokenizer, "is_fast", False):
        # transformers sets options of the tokenizer with every call, which threads may not
        return Codec(tokenizer.backend_tokenizer), names
    return PythonCodec(tokenizer), names


def _load(place: Path, directory: Path, files: TokenFiles, trust: bool) -> Any:
    from transformers import AutoTokenizer, PretrainedConfig, Qwen2Tokenizer

    remote = files.auto_map
    # without one transformers would run the code of the model's configuration
    config = PretrainedConfig()
    settings = place / "config.json"
    given = read_object(settings, TokenizerError) if settings.is_file() else {}
    for name in ("model_type", "tokenizer_class"):
        if isinstance(given.get(name), str):
            setattr(config, name, given[name])
    options = {"config": config, "local_files_only": True}
    try:
        if remote and _is_byte_level(place):
            # Dream ships Qwen2's vocabulary with code of its own, which this replaces
            return Qwen2Tokenizer.from_pretrained(str(place))
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False, **options)
    except Exception as error:  # the libraries below raise bare Exception
        if not remote:
            raise TokenizerError(
                f"no tokenizer could be loaded from {directory}: {error}"
            ) from error
        needs = f"the tokenizer of {directory} needs its own code to load"
        if remote_code_forbidden():
            raise TokenizerError(
                f"{needs}, which {CODE_VARIABLE} forbids on this machine; add a tokenizer.json"
            ) from error
        if not trust:
            raise TokenizerError(
                f"{needs}; pass trust_remote_code=True if you trust it, or add a tokenizer.json"
            ) from error
    return load_by_own_code(directory, place, files)


def _is_byte_level(directory: Path) -> bool:
    """Whether there are the two files of a byte-level BPE vocabulary."""
    return all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))


@contextmanager
def _readable(directory: Path) -> Iterator[Path]:
    """The directory, or a copy of its texts without byte order marks, which libraries stumble over.

    Raises:
        TokenizerError: a file is a git-lfs pointer.
    """
    texts = [path for form in _TEXTS for path in sorted(directory.glob(form)) if path.is_file()]
    try:
        for path in directory.glob("*.model"):
            has_mark(path)  # or it is a pointer
        if not any(map(has_mark, texts)):
            yield directory
            return
        with TemporaryDirectory(prefix="dllmserve-") as made:
            copy = Path(made) / directory.name
            copy.mkdir()
            for path in texts:
                (copy / path.name).write_bytes(read_bytes(path))
            for path in directory.glob("*.model"):
                shutil.copy(path, copy)
            yield copy
    except NotText as error:
        raise TokenizerError(str(error)) from error


class PythonCodec(Codec):
    """A tokenizer of transformers that is Python code, a checkpoint's own perhaps.

    Nobody says of such code that threads can share it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = dict(tokenizer.get_vocab())
        # a model may propose ids that only pad its LM head; Python tokenizers fail on them
        self._known = frozenset(self._vocabulary.values())
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool) -> list[int]:
        """See Codec."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=special))

    def encode_literally(self, text: str) -> list[int]:
        """See Codec."""
        with self._lock:
            return list(
                self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )

    def decode(self, ids: list[int]) -> str:
        """See Codec."""
        known = [i for i in ids if i in self._known]
        with self._lock:
            return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def added_tokens(self) -> Mapping[int, AddedToken]:
        """See Codec."""
        from tokenizers import AddedToken

        found = dict(self._tokenizer.added_tokens_decoder)
        for text in self._tokenizer.all_special_tokens:  # some classes keep theirs to themselves
            place = self._vocabulary.get(text)
            if place is not None and place not in found:
                found[place] = AddedToken(text, special=True)
        return found

    def token_id(self, text: str) -> int | None:
        """See Codec."""
        return self._vocabulary.get(text)
