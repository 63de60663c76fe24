"""How checkpoints call tools: what their templates write, or our own form."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllmserve.engine.template import ChatTemplate
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.engine.tool_form import OWN, ToolForm, form_of
from dllmserve.models.loader import find_model
from tests.engine.templates import BRACKETS, CHATML, HEADERS, OPEN_ENDED, THINKING

#: calls are objects behind a word
LISTED = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ ', ' if not loop.first }}[CALL] "
    '{"tool": {{ c.function.name | tojson }}, "with": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% endif %}</s>{% endfor %}"
)
#: shows tools and calls, but not what tools answer
FORGETFUL = LISTED.replace("]{{ m.content }}", "]{{ m.content if m.role != 'tool' }}")
#: shows no tools
UNTOLD = LISTED.replace("{{ tools | tojson }}", "")
#: arguments before the name
TURNED = LISTED.replace(
    '{"tool": {{ c.function.name | tojson }}, "with": {{ c.function.arguments | tojson }}}',
    '{"with": {{ c.function.arguments | tojson }}, "tool": {{ c.function.name | tojson }}}',
)
#: the first call begins as the others do not
OPENED = LISTED.replace("[CALL] ", "{{ '[CALLS] ' if loop.first }}")
ONE_CALL = LISTED.replace(
    "{% for c in", "{{ m.tool_calls[1] and raise_exception('one') }}{% for c in"
)
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {}}}


def form(source: str, kept: Any = lambda text: text) -> ToolForm:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return template.render(messages, tools=tools, add_generation_prompt=False)

    return form_of(render, kept)


def test_forms_of_templates() -> None:
    thinking = THINKING.replace("\\\\n", "\\n")
    assert form(thinking) == replace(OWN, native=True)
    assert form(LISTED) == ToolForm('[CALL] {"tool": ', ', "with": ', "}", ", ", native=True)
    for source in (CHATML, HEADERS, OPEN_ENDED, FORGETFUL, UNTOLD, TURNED, OPENED, ONE_CALL):
        assert form(source) == OWN, source
    assert form(BRACKETS) == replace(OWN, system=False)
    # marks that no answer can hold
    assert form(thinking, lambda text: text.replace("<tool_call>", "")) == OWN


def test_messages_of_our_own_form() -> None:
    call = {"id": "c", "function": {"name": "add", "arguments": {"a": "é"}}}
    raw = {"id": "d", "function": {"name": "add", "arguments": "no JSON"}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well.", "tool_calls": [call, raw]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
        {"role": "tool", "content": "6", "tool_call_id": "d"},
        {"role": "assistant", "content": "11"},
    ]
    made = OWN.written(chat, None)
    assert made == [
        chat[0],
        {
            "role": "assistant",
            "content": "Well.\n"
            '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": no JSON}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n5\n</tool_response>\n<tool_response>\n6\n</tool_response>",
        },
        chat[4],
    ]
    assert chat[1]["tool_calls"] and chat[2]["content"] == "5"  # what was given stays
    introduced = OWN.written(chat, [ADD])
    assert introduced[1:] == made and introduced[0]["role"] == "system"
    text = introduced[0]["content"]
    assert f"<tools>\n{json.dumps(ADD)}\n</tools>" in text
    assert text.endswith('<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>')
    told = OWN.written([{"role": "system", "content": "Be kind."}, chat[0]], [ADD])
    assert told[0]["content"] == f"Be kind.\n\n{text}" and told[1:] == [chat[0]]
    without = replace(OWN, system=False).written(chat[:1], [ADD])
    assert without == [{"role": "user", "content": f"{text}\n\nHi"}]


def test_the_embedded_model_has_our_own_form() -> None:
    tokenizer = load_tokenizer(find_model("tiny"))
    assert tokenizer is not None and tokenizer.tool_form == OWN
    chat = [{"role": "user", "content": "Hi"}]
    for literal in (False, True):
        ids = tokenizer.chat_ids(chat, tools=[ADD], literal_contents=literal)
        text = tokenizer.decode(ids)
        assert '"name": "add"' in text and text.index("add") < text.index("Hi")
        plain = tokenizer.chat_ids(chat, literal_contents=literal)
        assert tokenizer.chat_ids(chat, tools=[], literal_contents=literal) == plain


def test_a_template_of_a_checkpoint_gets_its_tools(
    byte_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(byte_checkpoint)
    assert tokenizer is not None
    seen: list[Any] = []
    source = THINKING.replace("\\\\n", "\\n")
    monkeypatch.setattr(tokenizer, "_templates", {"default": source})
    template = ChatTemplate(source, {})

    def render(messages: Any, *, tools: Any = None, **_: Any) -> str:
        seen.append((messages, tools))
        return template.render(messages, tools=tools)

    assert tokenizer.tool_form.native
    monkeypatch.setattr(tokenizer, "render_chat", render)
    chat = [{"role": "user", "content": "Hi"}]
    tokenizer.chat_ids(chat, tools=[ADD])
    assert seen == [(chat, [ADD])]
