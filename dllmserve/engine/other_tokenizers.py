"""Tokenizers without a tokenizer.json, through transformers, which takes seconds to import.

The code that a checkpoint brings for its tokenizer is a file of the checkpoint's own directory, and
it runs from a copy of that directory's Python files, so a name that leads elsewhere, to another
repository or by a link, is never followed.
"""

from __future__ import annotations

import re
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dllmserve.config import CODE_VARIABLE, remote_code_forbidden
from dllmserve.engine.codec import Codec
from dllmserve.engine.token_files import TokenFiles
from dllmserve.errors import TokenizerError
from dllmserve.models.files import NotText, has_mark, read_bytes, read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken

    from dllmserve.constraints.vocabulary import Vocabulary

#: how a class is named: its file, without the ending, and its name
_CLASS = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
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
    return _load_by_own_code(directory, place, files)


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


def _load_by_own_code(directory: Path, place: Path, files: TokenFiles) -> Any:
    """The tokenizer that the checkpoint's own class makes. Warns before the class is loaded.

    Args:
        directory: of the checkpoint.
        place: of its other files, which may be a copy.
        files: as read from it.

    Raises:
        TokenizerError: the class is not one of the directory, or cannot be loaded.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    module, name = _named(directory, files)
    file = directory / f"{module}.py"
    if not _belongs(file, directory):
        raise TokenizerError(
            f"the tokenizer's code {file} is missing, or is a link to a file elsewhere, which is "
            "not run; add a tokenizer.json"
        )
    warnings.warn(
        f"running the tokenizer code of a checkpoint: class {name} of {file.absolute()}, and what "
        "that imports",
        stacklevel=2,
    )
    with TemporaryDirectory(prefix="dllmserve-") as made:
        copy = Path(made) / directory.name
        copy.mkdir()
        for path in directory.glob("*.py"):
            if _belongs(path, directory):
                shutil.copyfile(path, copy / path.name)
        try:
            kind = get_class_from_dynamic_module(
                f"{module}.{name}", str(copy), local_files_only=True
            )
            # not trusted here: the model's configuration would run its code
            return kind.from_pretrained(str(place), local_files_only=True)
        except Exception as error:  # it is foreign code
            raise TokenizerError(
                f"the tokenizer code of {directory} cannot be run ({error}); add a tokenizer.json"
            ) from error


def _named(directory: Path, files: TokenFiles) -> tuple[str, str]:
    """Module and class that the tokenizer's configuration names; of two, the fast one."""
    given = files.config.get("auto_map")
    classes = given.get("AutoTokenizer") if isinstance(given, dict) else given
    each = classes if isinstance(classes, list) else [classes]
    texts = [text for text in each if isinstance(text, str)]
    found = _CLASS.fullmatch(texts[-1]) if texts else None
    if found is None:
        raise TokenizerError(
            f"the tokenizer of {directory} names its code {classes!r}, which is no FILE.CLASS of "
            "that directory; code from elsewhere is not run: add a tokenizer.json"
        )
    return found[1], found[2]


def _belongs(file: Path, directory: Path) -> bool:
    """Whether a file is the directory's own, wherever links lead.

    In the hub's cache the files of a snapshot are links to the blobs of the same repository.
    """
    real, root = file.resolve(), directory.resolve()
    blobs = root.parent.parent / "blobs"
    in_cache = root.parent.name == "snapshots" and real.parent == blobs
    return real.is_file() and (in_cache or real.is_relative_to(root))


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

    def vocabulary(self) -> Vocabulary:
        """See Codec."""
        kind = type(self._tokenizer).__name__
        raise TokenizerError(
            f"constraints do not work with this tokenizer: {kind} is Python code that does not say "
            "which bytes its tokens are; add a tokenizer.json"
        )

    def token_id(self, text: str) -> int | None:
        """See Codec."""
        return self._vocabulary.get(text)
