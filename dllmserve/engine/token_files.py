"""The files of a tokenizer beside its vocabulary: special tokens and chat templates.

Files are read in the order of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmserve.errors import TokenizerError
from dllmserve.models.files import NotText, read_json, read_object, read_text

if TYPE_CHECKING:
    from tokenizers import AddedToken

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
#: the template for prompts without tools
DEFAULT = "default"


@dataclass(frozen=True)
class TokenFiles:
    """What the files say.

    Attributes:
        config: tokenizer_config.json, with an older special_tokens_map.json merged in.
        names: variables of chat templates that are tokens, such as ``bos_token``.
        added: tokens beside those of tokenizer.json, in the order of their ids.
        templates: chat templates by name.
    """

    config: dict[str, Any]
    names: dict[str, str]
    added: tuple[AddedToken, ...]
    templates: dict[str, str]

    @property
    def auto_map(self) -> bool:
        """Whether the tokenizer comes with code of its own."""
        given = self.config.get("auto_map")
        # older files have the pair of class names itself
        return isinstance(given, list) or (isinstance(given, dict) and "AutoTokenizer" in given)


def read_token_files(directory: Path) -> TokenFiles:
    """Read them; all may be absent.

    Raises:
        TokenizerError: one of them is no JSON object, or no text.
    """
    config = _object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # a file with this field lists all tokens
        config = config | _object(directory / "special_tokens_map.json")
    names = dict(_names(config))
    return TokenFiles(
        config, names, tuple(_added(directory, config, names)), _templates(directory, config)
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, TokenizerError)
    return value if isinstance(value, dict) else {}


def _names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    extra = config.get("extra_special_tokens")
    named = extra if isinstance(extra, dict) else {}
    for name, value in {**config, **named}.items():
        # not add_bos_token and its like, which are switches
        if (name.endswith("_token") or name in named) and (text := _text(value)) is not None:
            yield name, text


def _text(value: Any) -> str | None:
    """A token is a string, or an object with the string in "content"."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _added(directory: Path, config: Mapping[str, Any], names: dict[str, str]) -> list[AddedToken]:
    from tokenizers import AddedToken

    special = [*names.values()]
    for field in _LISTS:
        given = config.get(field)
        special += [t for t in map(_text, given if isinstance(given, list) else []) if t]
    decoder = config.get("added_tokens_decoder")
    listed: dict[int, AddedToken] = {}
    if isinstance(decoder, dict):
        read = {int(i): _token(v, special) for i, v in decoder.items() if i.isdigit()}
        listed = {i: token for i, token in read.items() if token is not None}
    else:
        for text, i in _object(directory / "added_tokens.json").items():
            if isinstance(i, int):
                known = text in special
                listed[i] = AddedToken(text, normalized=not known, special=known)
    tokens = [listed[i] for i in sorted(listed)]
    texts = {t.content for t in tokens}
    return tokens + [AddedToken(t, special=True) for t in dict.fromkeys(special) if t not in texts]


def _token(value: Any, special: list[str]) -> AddedToken | None:
    from tokenizers import AddedToken

    text = _text(value)
    if not text:
        return None
    flags = value if isinstance(value, dict) else {}
    given = {name: bool(flags[name]) for name in _FLAGS if name in flags}
    return AddedToken(text, special=bool(flags.get("special")) or text in special, **given)


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates in files of their own go before those in JSON."""
    named = {}
    one, more = directory / "chat_template.jinja", directory / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")):
        named[path.stem] = _template_text(path)
    if one.is_file():
        named[DEFAULT] = _template_text(one)
    if named:
        return named
    found = _named(config.get("chat_template"))
    # what processors of older checkpoints read
    legacy = directory / "chat_template.json"
    if not found and legacy.is_file():
        found = _named(read_object(legacy, TokenizerError).get("chat_template"))
    return found


def _named(given: Any) -> dict[str, str]:
    """Templates by name, from a text, a list of names with texts, or a table."""
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, list):
        given = {t["name"]: t.get("template") for t in given if isinstance(t, dict) and "name" in t}
    if not isinstance(given, dict):
        return {}
    return {str(name): text for name, text in given.items() if isinstance(text, str)}


def _template_text(path: Path) -> str:
    try:
        return read_text(path)
    except NotText as error:
        raise TokenizerError(str(error)) from error
