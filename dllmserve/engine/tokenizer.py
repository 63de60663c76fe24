"""Tokenizer: text to ids and back, and chat templates.

tokenizer.json is read with the ``tokenizers`` library, which loads in milliseconds;
anything else goes through transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmserve.engine.codec import Codec, FastCodec
from dllmserve.engine.controls import Controls
from dllmserve.engine.token_files import DEFAULT, TokenFiles, read_token_files
from dllmserve.errors import PromptError, TokenizerError
from dllmserve.models.files import NotText, read_bytes

if TYPE_CHECKING:
    from dllmserve.engine.template import ChatTemplate

_log = logging.getLogger(__name__)

#: the template for prompts with tools, if there is one
_TOOL_USE = "tool_use"
#: what an assistant says to find out what the template writes behind it
_ANSWER = "forty-two"


class Tokenizer:
    """Text codec of one checkpoint.

    Args:
        codec: the vocabulary.
        templates: chat templates by name.
        names: variables of the templates, such as ``bos_token``.

    Example:
        >>> tokenizer = load_tokenizer(find_model("tiny"))  # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("Hello"))  # doctest: +SKIP
        'Hello'
    """

    def __init__(
        self, codec: Codec, templates: Mapping[str, str], names: Mapping[str, str]
    ) -> None:
        self._codec = codec
        self._templates = dict(templates)
        self._names = dict(names)
        self._compiled: dict[str, ChatTemplate] = {}

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's chat template (Jinja); None without one."""
        return self._templates.get(DEFAULT)

    @property
    def has_chat_template(self) -> bool:
        """Whether chat() can be used."""
        return DEFAULT in self._templates

    @property
    def end_id(self) -> int | None:
        """Id of the tokenizer's own eos_token, or None."""
        text = self._names.get("eos_token")
        return None if text is None else self._codec.token_id(text)

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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        literal_contents: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation, up to where the assistant speaks.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``.
            literal_contents: a control token's text inside any text of the messages and tools
                becomes ordinary text, so that whoever wrote it cannot end a message or speak
                for others. Control tokens are the tokenizer's added tokens.
            tools: what the template is told of tools.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
            PromptError: a message is no valid Unicode text, or holds a character that is
                a control token by itself.
        """
        if not literal_contents:
            # the template writes the special tokens itself
            return self.encode(self.render_chat(messages, tools=tools), special=False)
        template = self._template(tools)
        return self._controls.encode(template.render(messages, tools=tools, marked=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._codec.decode(list(ids))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation, up to where the assistant speaks.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
        """
        return self._template(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )

    def turn_end(self) -> int | None:
        """Id of the first control token that the chat template writes behind an answer.

        None without a template, or where it writes none.
        """
        failure: TokenizerError | None = None
        # some templates take parts alone, some close the last answer only if a prompt follows
        for form in (str, _as_parts):
            chat = [
                {"role": "user", "content": form("Hello")},
                {"role": "assistant", "content": form(_ANSWER)},
            ]
            for follows in (False, True):
                try:
                    text = self.render_chat(chat, add_generation_prompt=follows)
                    opening = self._opening(chat[:1]) if follows else ""
                except TokenizerError as error:
                    failure = error
                    continue
                _, said, rest = text.removesuffix(opening).rpartition(_ANSWER)
                if said and (found := self._controls.first(rest)) is not None:
                    return found
        if failure is not None and self.has_chat_template:
            _log.warning("what ends a turn was not found in the chat template: %s", failure)
        return None

    def _opening(self, messages: list[dict[str, Any]]) -> str:
        """What the template writes for the assistant to begin."""
        closed = self.render_chat(messages, add_generation_prompt=False)
        return self.render_chat(messages).removeprefix(closed)

    def warm_up(self) -> None:
        """Import and compile what chats need, which a server must not do under load."""
        with suppress(TokenizerError):
            self.encode_chat([{"role": "user", "content": "<Hello>"}], literal_contents=True)

    @cached_property
    def _controls(self) -> Controls:
        return Controls(self._codec, self._templates.values())

    def _template(self, tools: object = None) -> ChatTemplate:
        """The chat template; to compile it takes much longer than to render it."""
        name = _TOOL_USE if tools is not None and _TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            others = ", ".join(sorted(self._templates))
            has = f"has chat templates named {others}, none named {DEFAULT}" if others else ""
            raise TokenizerError(
                f"the checkpoint {has or 'has no chat template'}; use generate() instead"
            )
        if name not in self._compiled:
            from dllmserve.engine.template import ChatTemplate

            self._compiled[name] = ChatTemplate(
                self._templates[name], self._names, self._controls.marks
            )
        return self._compiled[name]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
    """The directory's tokenizer, or None if it has none at all.

    Remote code runs only if nothing plain can be loaded, trust_remote_code is set and the
    tokenizer asks for it; a warning says so. Code of a model never runs.

    Raises:
        TokenizerError: there are tokenizer files, but none could be loaded.
    """
    files = read_token_files(directory)
    path = directory / "tokenizer.json"
    if path.is_file():
        return Tokenizer(_fast_codec(path, files), files.templates, files.names)
    if (
        not files.config
        and not any(directory.glob("vocab*"))
        and not any(directory.glob("*.model"))
    ):
        return None
    from dllmserve.engine.other_tokenizers import load_other

    codec, names = load_other(directory, files, trust_remote_code)
    return Tokenizer(codec, files.templates, names)


def _fast_codec(path: Path, files: TokenFiles) -> FastCodec:
    from tokenizers import Tokenizer as Fast

    try:
        return FastCodec(Fast.from_buffer(read_bytes(path)), files.added)
    except NotText as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error
