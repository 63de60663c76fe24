"""The code that a checkpoint brings for its tokenizer: which file that is, and running it.

It is a file of the checkpoint's own directory, and it runs from a copy of that directory's Python
files, so a name that leads elsewhere, to another repository or by a link, is never followed.
"""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dllmserve.engine.token_files import TokenFiles
from dllmserve.errors import TokenizerError

#: how a class is named: its file, without the ending, and its name
_CLASS = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


def load_by_own_code(directory: Path, place: Path, files: TokenFiles) -> Any:
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
