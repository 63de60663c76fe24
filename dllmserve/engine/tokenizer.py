"""Tokenizer: text to ids and back, chat templates, and where answers end.

tokenizer.json is read with the ``tokenizers`` library, which loads in milliseconds;
anything else goes through transformers.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmserve.config import remote_code_forbidden
from dllmserve.core.model_spec import ModelSpec
from dllmserve.engine.codec import Codec, Controls, valid_text
from dllmserve.engine.token_files import DEFAULT, TokenFiles, read_token_files
from dllmserve.engine.tool_form import ToolForm, form_of, has_tools
from dllmserve.errors import PromptError, TokenizerError
from dllmserve.models.files import NotText, read_bytes

if TYPE_CHECKING:
    from dllmserve.constraints.vocabulary import Vocabulary
    from dllmserve.engine.marked import LiteralPrompts, MarkedTemplate
    from dllmserve.engine.template import ChatTemplate

_log = logging.getLogger(__name__)

#: the template for prompts with tools, if there is one
_TOOL_USE = "tool_use"
#: a chat to find out what the template writes behind an answer
_QUESTION, _ANSWER, _NEXT = "Hello", "fortytwo", "Thanks"
_TOLD = ("system", "Answer")
_ASKED = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]


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
        self._marked: dict[str, MarkedTemplate] = {}

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
        return self._codec.encode(valid_text(text), special)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids that the tokenizer adds before a plain prompt."""
        plain, whole = (self._codec.encode(_QUESTION, special) for special in (False, True))
        places = range(len(whole) - len(plain) + 1)
        found = (i for i in places if whole[i : i + len(plain)] == plain)
        return whole[: next(found, 0)]

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        literal_contents: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """As :meth:`encode_chat`, for any chat template.

        A template that knows no tools gets them, calls and answers as texts: see :attr:`tool_form`.
        With ``continue_final_message`` the last message has to be a text of the assistant.
        """
        if continue_final_message:
            from dllmserve.messages import check_open  # which generate() has no use for

            check_open(messages)
        if (tools or has_tools(messages)) and not self.tool_form.native:
            messages, tools = self.tool_form.written(messages, tools), None
        return self.encode_chat(
            messages,
            literal_contents=literal_contents,
            tools=tools,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        literal_contents: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation, up to where the assistant speaks.

        Args:
            messages: ``[{"role": "user", "content": "..."}]``.
            literal_contents: a control token's text inside any text of the messages and tools
                becomes ordinary text, so that whoever wrote it cannot end a message or speak
                for others. Control tokens are the tokenizer's added tokens.
            tools: what the template is told of tools.
            continue_final_message: the last message is the assistant's, and is left open, so that
                the prompt ends where its text does.
            variables: more that the template may read.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
            PromptError: a message is no valid Unicode text, or holds a character that is
                a control token by itself.
        """
        asked: dict[str, Any] = {"tools": tools, "variables": variables}
        asked["continue_final_message"] = continue_final_message
        if not literal_contents:
            # the template writes the special tokens itself
            return self.encode(self.render_chat(messages, **asked), special=False)
        name = self._template_name(tools)
        if name not in self._marked:
            from dllmserve.engine.marked import MarkedTemplate

            source, marks = self._templates[name], self._literal.marks
            self._marked[name] = MarkedTemplate(source, self._names, marks)
        return self._literal.encode(self._marked[name].render(messages, **asked))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return self._codec.decode(list(ids))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, up to where the assistant speaks.

        Raises:
            TokenizerError: no chat template, or the template refuses the messages.
        """
        name = self._template_name(tools)
        if name not in self._compiled:  # to compile it takes much longer than to render it
            from dllmserve.engine.template import ChatTemplate

            self._compiled[name] = ChatTemplate(self._templates[name], self._names)
        return self._compiled[name].render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    @cached_property
    def tool_form(self) -> ToolForm:
        """How the checkpoint calls tools; it is looked for once, which takes milliseconds."""

        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
            return self.render_chat(messages, tools=tools, add_generation_prompt=False)

        return form_of(render, lambda text: self.decode(self.encode(text, special=False)))

    def turn_end(self) -> int | None:
        """Id of the first control token that the chat template writes behind an answer.

        None without a template, or where it writes none. Templates differ in the chats that they
        take, so several are tried; of what the first one that shows a token shows, that counts.
        """
        failure: TokenizerError | None = None
        forms: tuple[Callable[[str], Any], ...] = (str, _as_parts)
        for probe in (self._behind_answer, self._between_turns):
            for asked, form in itertools.product((_ASKED, [_TOLD, *_ASKED]), forms):
                chat = [{"role": role, "content": form(text)} for role, text in asked]
                try:
                    found = self._controls.first(probe(chat))
                except TokenizerError as error:
                    failure = error
                    continue
                if found is not None:
                    return found
        if failure is not None and self.has_chat_template:
            _log.warning("what ends a turn was not found in the chat template: %s", failure)
        return None

    def _behind_answer(self, chat: list[dict[str, Any]]) -> str:
        """What the template writes behind an answer that is the last message."""
        answered, asked = chat[:-1], chat[:-2]
        plain = self.render_chat(answered, add_generation_prompt=False)
        rest = plain.rpartition(_ANSWER)[2] if _ANSWER in plain else ""
        if self._controls.first(rest) is not None:
            return rest
        # some close the last answer only if a prompt follows, which is the next turn's
        closed = self.render_chat(asked, add_generation_prompt=False)
        opening = self.render_chat(asked).removeprefix(closed)
        text = self.render_chat(answered).removesuffix(opening)
        return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""

    def _between_turns(self, chat: list[dict[str, Any]]) -> str:
        """What the template writes between an answer and a question, but not before every one."""
        text = self.render_chat(chat, add_generation_prompt=False)
        before, _, rest = text.partition(_QUESTION)
        between = rest.partition(_ANSWER)[2].partition(_NEXT)[0]
        new = next(i for i in range(len(between) + 1) if before.endswith(between[i:]))
        return between[:new]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token, for constraints.

        Raises:
            TokenizerError: they cannot be known.
        """
        return self._codec.vocabulary()

    def warm_up(self) -> None:
        """Import and compile what chats need, which a server must not do under load."""
        for literal in (False, True):
            with suppress(TokenizerError):
                self.encode_chat([{"role": "user", "content": "<Hello>"}], literal_contents=literal)

    @cached_property
    def _controls(self) -> Controls:
        return Controls(self._codec, self._templates.values())

    @cached_property
    def _literal(self) -> LiteralPrompts:
        from dllmserve.engine.marked import LiteralPrompts

        return LiteralPrompts(self._codec, self._controls)

    def _template_name(self, tools: object = None) -> str:
        """The name of the chat template."""
        name = _TOOL_USE if tools is not None and _TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            others = ", ".join(sorted(self._templates))
            has = f"has chat templates named {others}, none named {DEFAULT}" if others else ""
            raise TokenizerError(
                f"the checkpoint {has or 'has no chat template'}; use generate() instead"
            )
        return name


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
    """The directory's tokenizer, or None if it has none at all.

    Its own code runs only if nothing else can load it, trust_remote_code is set and the machine
    does not forbid it (``DLLMSERVE_TRUST_REMOTE_CODE=0``); a warning names the file before. Code of
    a model never runs.

    Raises:
        TokenizerError: there are tokenizer files, but none could be loaded.
        ConfigError: ``DLLMSERVE_TRUST_REMOTE_CODE`` is neither true nor false.
    """
    remote_code_forbidden()  # a wrong value is an error also where nothing depends on it
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


def _fast_codec(path: Path, files: TokenFiles) -> Codec:
    from tokenizers import Tokenizer as Fast

    try:
        return Codec(Fast.from_buffer(read_bytes(path)), files.added)
    except NotText as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def with_ends(spec: ModelSpec, tokenizer: Tokenizer | None, *, only: bool = False) -> ModelSpec:
    """The spec with every id that ends an answer; with ``only``, the spec's are all.

    These are the end ids of config.json and generation_config.json, the tokenizer's
    eos_token, and the control token that the chat template writes behind an answer. That
    last one ends a turn; it is in ``turn_end_ids`` as well unless nothing else ends a text.
    Ids that no answer can hold are left out: the mask, and those without an embedding.
    """
    named = list(spec.eos_ids)
    turn = None
    if tokenizer is not None:
        own, turn = tokenizer.end_id, tokenizer.turn_end()
        named += [] if only else [id for id in (own, turn) if id is not None]
    ends = tuple(id for id in dict.fromkeys(named) if _possible(id, spec))
    turns = (turn,) if turn in ends and len(ends) > 1 else ()
    return replace(spec, eos_ids=ends, turn_end_ids=tuple(id for id in turns if id is not None))


def _possible(id: int, spec: ModelSpec) -> bool:
    if 0 <= id < spec.embedding_size and id != spec.mask_id:
        return True
    what = "the mask" if id == spec.mask_id else f"outside the {spec.embedding_size} embeddings"
    _log.warning("end id %d is left out: it is %s", id, what)
    return False


class AnswerText:
    """Decodes answers; without a tokenizer every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def read(self, ids: list[int], stops: Sequence[str]) -> tuple[str, int, bool]:
        """Decode an answer and cut it before the first stop string.

        Returns:
            The text, how many ids belong to it (up to the one that completes the stop
            string), and whether a stop string was found.
        """
        if self._tokenizer is None:
            return "", len(ids), False
        decode = self._tokenizer.decode
        text = decode(ids)
        cut = _first(text, stops)
        if cut is None:
            return text, len(ids), False

        def complete(count: int) -> bool:
            return _first(decode(ids[:count]), stops) is not None

        return text[:cut], 1 + bisect_left(range(1, len(ids)), True, key=complete), True


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Index of the earliest stop string in the text, or None."""
    found = [place for place in (text.find(s) for s in stops) if place >= 0]
    return min(found) if found else None


def prompt_ids(tokenizer: Tokenizer | None, prompt: Any, name: str) -> list[int]:
    """Token ids of a prompt: a text, or ids in any kind of sequence, array or tensor.

    Args:
        tokenizer: the checkpoint's, or None.
        prompt: as somebody gave it.
        name: what errors call it.

    Raises:
        TokenizerError: a text, but the checkpoint has no tokenizer.
        PromptError: neither text nor ids, or no valid Unicode text.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TokenizerError(
                f"{name} is a text, but the checkpoint has no tokenizer: give token ids"
            )
        return tokenizer.encode(prompt)
    if hasattr(prompt, "tolist"):  # a numpy array or a tensor
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        return list(prompt)
    raise PromptError(f"{name} must be a text or a list of token ids, got {type(prompt).__name__}")
