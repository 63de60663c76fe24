"""Tokenizer: text to ids and back, and chat templates.

tokenizer.json is read with the ``tokenizers`` library, which loads in milliseconds;
anything else goes through transformers.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dllmserve.errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

#: private-use characters that stand for special tokens' texts while a template is rendered
_MARKS = range(0x100000, 0x10FFFE)


class _Codec(Protocol):
    def encode(self, text: str, special: bool) -> list[int]: ...

    def encode_literally(self, text: str) -> list[int]: ...

    def special_texts(self) -> tuple[str, ...]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Text codec of one checkpoint.

    Example:
        >>> tokenizer = load_tokenizer(find_model("tiny"))  # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("Hello"))  # doctest: +SKIP
        'Hello'
    """

    def __init__(self, codec: _Codec, template: str | None, names: Mapping[str, str]) -> None:
        self._codec = codec
        self._template = template
        self._names = dict(names)

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's chat template (Jinja); None without one."""
        return self._template

    @property
    def has_chat_template(self) -> bool:
        """Whether chat() can be used."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text. ``special`` adds what the tokenizer adds to a plain prompt.

        Raises:
            PromptError: the text holds lone surrogates, which are no characters.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode text: {error}") from error
        return self._codec.encode(text, special)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, literal_contents: bool = False
    ) -> list[int]:
        """Prompt ids of a conversation, up to where the assistant speaks.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``.
            literal_contents: a special token's text inside a message becomes ordinary text,
                so that whoever wrote the message cannot end it or speak for others.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
            PromptError: a message is no valid Unicode text.
        """
        marks: dict[str, str] = {}
        if literal_contents:
            messages, marks = _marked(messages, self._codec.special_texts())
        text = self.render_chat(messages)
        if not marks:
            # the template writes the special tokens itself
            return self.encode(text, special=False)
        ids: list[int] = []
        for part in re.split(f"([{''.join(marks)}])", text):
            if part in marks:
                ids += self._codec.encode_literally(marks[part])
            elif part:
                ids += self.encode(part, special=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._codec.decode(list(ids))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation, up to where the assistant speaks.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=True, **self._names
            )
        except TokenizerError:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TokenizerError(f"the chat template failed: {error}") from error

    def warm_up(self) -> None:
        """Import and compile what chats need, which a server must not do under load."""
        with suppress(TokenizerError):
            self.render_chat([{"role": "user", "content": "Hello"}])

    @cached_property
    def _compiled(self) -> Template:
        """The chat template; to compile it takes much longer than to render it."""
        if self._template is None:
            raise TokenizerError("the checkpoint has no chat template; use generate() instead")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TokenizerError(f"the chat template refused the messages: {message}")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        return environment.from_string(self._template)


class _FastCodec:
    """tokenizer.json through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_file(str(path))
        self._fast.no_padding()
        self._fast.no_truncation()
        self._literal: Any = None

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._fast.encode(text, add_special_tokens=special).ids
        return ids

    def encode_literally(self, text: str) -> list[int]:
        if self._literal is None:
            literal = type(self._fast).from_str(self._fast.to_str())
            literal.encode_special_tokens = True
            self._literal = literal  # last: other threads use it as soon as it is there
        ids: list[int] = self._literal.encode(text, add_special_tokens=False).ids
        return ids

    def special_texts(self) -> tuple[str, ...]:
        added = self._fast.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def decode(self, ids: list[int]) -> str:
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text


class _TransformersCodec:
    """Any other tokenizer through transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # a model may propose ids that only pad its LM head; Python tokenizers fail on them
        self._known = frozenset(tokenizer.get_vocab().values())
        # an encoding sets options of the tokenizer that others use at the same time
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=special))

    def encode_literally(self, text: str) -> list[int]:
        with self._lock:
            return list(
                self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            )

    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._tokenizer.all_special_tokens)

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i in self._known]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
    """The directory's tokenizer, or None if it has none at all.

    Remote code runs only if nothing plain can be loaded, trust_remote_code is set and the
    tokenizer asks for it; a warning says so.

    Raises:
        TokenizerError: there are tokenizer files, but none could be loaded.
    """
    config = _read(directory / "tokenizer_config.json")
    template = _chat_template(directory, config)
    names = {k: _token_text(v) for k, v in config.items() if k.endswith("_token")}
    fast = directory / "tokenizer.json"
    if fast.is_file():
        try:
            return Tokenizer(_FastCodec(fast), template, names)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{fast} cannot be read: {error}") from error
    if not config and not any(directory.glob("vocab*")) and not any(directory.glob("*.model")):
        return None
    codec = _TransformersCodec(_slow_tokenizer(directory, config, trust_remote_code))
    return Tokenizer(codec, template, names)


def _slow_tokenizer(directory: Path, config: dict[str, Any], trust: bool) -> Any:
    from transformers import AutoTokenizer, Qwen2Tokenizer

    remote = "AutoTokenizer" in (config.get("auto_map") or {})
    try:
        if remote and _is_byte_level(directory):
            # Dream ships Qwen2's vocabulary with code of its own, which this replaces
            return Qwen2Tokenizer.from_pretrained(str(directory))
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # the libraries below raise bare Exception
        if not remote:
            raise TokenizerError(
                f"no tokenizer could be loaded from {directory}: {error}"
            ) from error
        if not trust:
            raise TokenizerError(
                f"the tokenizer of {directory} needs its own code to load; "
                "pass trust_remote_code=True if you trust it, or add a tokenizer.json"
            ) from error
    warnings.warn(f"running the tokenizer code shipped with {directory}", stacklevel=2)
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=True)
    except Exception as error:  # it is foreign code
        raise TokenizerError(
            f"the tokenizer code of {directory} cannot be run ({error}); add a tokenizer.json"
        ) from error


def _marked(
    messages: Sequence[Mapping[str, Any]], specials: Sequence[str]
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Replace the texts of special tokens in contents by marks that no message contains.

    Returns:
        The messages, and each mark with the text that it stands for.
    """
    contents = "".join(m["content"] for m in messages if isinstance(m.get("content"), str))
    # longest first, so that a token that contains another one is taken whole
    found = sorted((s for s in specials if s and s in contents), key=len, reverse=True)
    free = (chr(c) for c in range(_MARKS.start, _MARKS.stop) if chr(c) not in contents)
    marks = dict(zip(free, found, strict=False))
    if len(marks) < len(found):
        raise PromptError("the messages use up all private-use characters of Unicode's plane 16")
    marked: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            for mark, text in marks.items():
                content = content.replace(text, mark)
            message = {**message, "content": content}
        marked.append(message)
    return marked, marks


def _is_byte_level(directory: Path) -> bool:
    """Whether there are the two files of a byte-level BPE vocabulary."""
    return all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _to_json(value: Any, **options: Any) -> str:
    """The tojson of chat templates: like transformers', it escapes nothing."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _token_text(value: Any) -> str:
    """Special tokens are strings, or objects with the string in "content"."""
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return "" if value is None else str(value)
