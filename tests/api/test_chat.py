"""chat() and the tokenizer behind it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dllmserve import LLM, SamplingParams
from dllmserve.engine.other_tokenizers import PythonCodec
from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import PromptError, TokenizerError
from tests.checkpoints import CHAT_TEMPLATE, byte_tokenizer
from tests.conftest import Engines

PARAMS = SamplingParams(temperature=0.0, gen_length=6, steps=3, ignore_eos=True)
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def llm(engines: Engines, byte_checkpoint: Path) -> LLM:
    return engines(byte_checkpoint)


def test_the_template_is_applied(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.chat_ids([USER])
    assert ids == [257, *llm.tokenizer.encode("Hi"), 256, 258]
    chatted = llm.chat([USER], PARAMS, use_tqdm=False)
    generated = llm.generate([ids], PARAMS, use_tqdm=False)
    assert chatted == generated


def test_several_conversations(llm: LLM) -> None:
    long = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, USER]
    both = llm.chat([[USER], long], [PARAMS, PARAMS], use_tqdm=False)
    assert both == [llm.chat(c, PARAMS, use_tqdm=False)[0] for c in ([USER], long)]
    assert both[0]["usage"]["prompt_tokens"] == 5
    assert both[1]["usage"]["prompt_tokens"] == 11
    assert llm.chat([], PARAMS) == []


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ("Hi", "must be a list of messages, got str"),
        (3, "got int"),
        (None, "got NoneType"),
        ([{"content": "Hi"}], "'role' and 'content'"),
        ([{"role": 3, "content": "Hi"}], "'role' and 'content'"),
        ([{"role": "user"}], "content must be a text"),
        ([{"role": "user", "content": ["Hi"]}], "content must be a text"),
        ([[USER], []], "conversation 1 must be a non-empty list"),
        ([[USER], 5], "conversation 1"),
        ([["Hi"]], "'role' and 'content'"),
        (["Hi"], "'role' and 'content'"),
    ],
)
def test_bad_messages(llm: LLM, messages: Any, part: str) -> None:
    with pytest.raises(PromptError) as caught:
        llm.chat(messages, PARAMS, use_tqdm=False)
    assert part in str(caught.value)


def test_histories_of_other_servers(llm: LLM) -> None:
    """What HTTP takes: a tool's turn, a message of nothing but calls, parts, and null."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "S", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": None},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    plain = [
        {"role": "system", "content": "S"},
        USER,
        # its template knows no tools
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\n7\n</tool_response>"},
    ]
    assert llm.chat_ids(turns) == llm.chat_ids(plain)
    assert llm.chat(turns, PARAMS, use_tqdm=False) == llm.chat(plain, PARAMS, use_tqdm=False)


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls must be a list"),
        (
            {"role": "assistant", "tool_calls": [{"function": "f"}]},
            "needs a function with a name",
        ),
        ({"role": "tool", "content": None}, "content must be a text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part 0 has type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "content must be a text"),
    ],
)
def test_messages_that_are_none(llm: LLM, message: Any, part: str) -> None:
    with pytest.raises(PromptError, match=re.escape(part)) as caught:
        llm.chat_ids([USER, message])
    assert "messages[1]" in str(caught.value)


def test_a_template_may_refuse(llm: LLM) -> None:
    with pytest.raises(TokenizerError, match="refused the messages: no errors"):
        llm.chat([{"role": "error", "content": "x"}], PARAMS)


def test_without_a_tokenizer(engines: Engines, checkpoints: dict[str, Path]) -> None:
    plain = engines(checkpoints["llada"])
    assert plain.tokenizer is None
    with pytest.raises(TokenizerError, match="no tokenizer"):
        plain.chat([USER], PARAMS)
    with pytest.raises(TokenizerError, match="give token ids"):
        plain.generate(["Hi"], PARAMS)
    output = plain.generate([[1, 2]], PARAMS, use_tqdm=False)[0]
    assert output["text"] == ""
    assert len(output["token_ids"]) == 6


def settings(folder: Path, **changes: Any) -> None:
    """A byte tokenizer whose tokenizer_config.json holds the changes."""
    byte_tokenizer(folder, chat=False)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rendered(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.has_chat_template
    return tokenizer.render_chat([USER])


def test_where_templates_are_found(tmp_path: Path) -> None:
    expected = "<|user|>Hi<|end|><|assistant|>"
    settings(tmp_path, chat_template=CHAT_TEMPLATE)
    assert rendered(tmp_path) == expected
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    settings(tmp_path, chat_template=named)
    assert rendered(tmp_path) == expected
    settings(tmp_path, chat_template="not this one")
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert rendered(tmp_path) == expected


def test_special_tokens_may_be_text_or_objects(tmp_path: Path) -> None:
    settings(tmp_path, chat_template="{{ eos_token }}{{ bos_token }}{{ pad_token }}")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"bos_token": "<s>", "pad_token": None})
    )
    assert rendered(tmp_path) == "<|end|><s>"


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[0].role.missing.deeper }}",
        "{{ messages[0].content + 3 }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(no_such_option=1) }}",
    ],
)
def test_broken_templates(tmp_path: Path, template: str) -> None:
    settings(tmp_path, chat_template=template)
    with pytest.raises(TokenizerError, match="chat template failed"):
        rendered(tmp_path)


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    settings(tmp_path, chat_template="{{ messages.__class__.__mro__ }}{{ [].append(1) }}")
    with pytest.raises(TokenizerError, match="chat template failed"):
        rendered(tmp_path)


def test_no_chat_template(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, chat=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template; use generate"):
        tokenizer.render_chat([USER])


def test_no_tokenizer_files_at_all(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_config(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, chat=False)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


def test_tojson_takes_options(tmp_path: Path) -> None:
    settings(tmp_path, chat_template="{{ ['é'] | tojson(indent=1) }}")
    assert rendered(tmp_path) == '[\n "é"\n]'


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path, chat=False)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("given", [[1], [{"name": "other"}], 3])
def test_templates_of_a_wrong_type(tmp_path: Path, given: Any) -> None:
    settings(tmp_path, chat_template=given)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and not tokenizer.has_chat_template


def test_text_that_is_no_unicode(llm: LLM) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        llm.generate(["a", "b\ud800"], PARAMS)
    with pytest.raises(PromptError, match="not valid Unicode"):
        llm.chat([{"role": "user", "content": "\udfff"}], PARAMS)


@pytest.mark.filterwarnings("ignore:running the tokenizer code")
def test_tokenizer_code_that_is_not_there(tmp_path: Path) -> None:
    remote = {"AutoTokenizer": ["tokenization_absent.AbsentTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": remote, "tokenizer_class": "AbsentTokenizer"})
    )
    with pytest.raises(TokenizerError, match=r"add a tokenizer\.json"):
        load_tokenizer(tmp_path, trust_remote_code=True)
    with pytest.raises(TokenizerError, match="pass trust_remote_code=True"):
        load_tokenizer(tmp_path, trust_remote_code=False)


def test_ids_that_no_token_has_are_no_text() -> None:
    """Dream's LM head has more rows than its tokenizer has tokens."""

    class Strict:
        """As Python tokenizers: ids without a token become None, which cannot be joined."""

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 5}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join({0: "a", 5: "b"}[i] for i in ids)

    assert PythonCodec(Strict()).decode([0, 3, 5, 152000]) == "ab"
