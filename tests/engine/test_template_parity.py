"""Chat templates give what transformers gives: texts and ids, over a table of files."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import TokenizerError
from tests.engine.templates import CHATML, ODDS, TEMPLATES

#: older ones render empty keys and thoughts as they are given
pytestmark = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 24),
    reason="templates are compared with transformers 5.24 or newer",
)
TOKENS = ("<|end|>", "<s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
USER, BOT = {"role": "user"}, {"role": "assistant"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER | {"content": "Hello  there\n"}],
    "three": [USER | {"content": "é"}, BOT | {"content": " ok "}, USER | {"content": "<b> & co"}],
    "answered": [USER | {"content": "a"}, BOT | {"content": "b", "x": None}],
    "thoughts": [USER | {"content": "a"}, BOT | {"content": "b", "reasoning": "hm"}],
    "marks": [USER | {"content": "a"}, BOT | {"content": "<think>\nhm\n</think>\n\nb"}] * 2,
    "tools": [
        USER | {"content": "a"},
        BOT
        | {
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<é>", "y": [1, None]}}}],
        },
        {"role": "tool", "content": "<tool_response>", "name": "f"},
    ],
    "parts": [USER | {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "string"}}}]


def base(folder: Path) -> Path:
    """A byte-level tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def put(folder: Path, name: str, content: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **plain, **flags}


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}


def reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def same(folder: Path, **options: Any) -> None:
    """Compare text and ids, or that both refuse."""
    theirs, ours = reference(folder), load_tokenizer(folder)
    assert ours is not None
    for chat in CHATS.values():
        for opens in (True, False):
            given = {"add_generation_prompt": opens, **options}
            try:
                text = theirs.apply_chat_template(chat, tokenize=False, **given)
            except Exception:
                with pytest.raises(TokenizerError):
                    ours.render_chat(chat, **given)
                continue
            assert ours.render_chat(chat, **given) == text
            ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **given)
            if opens:
                assert ours.encode_chat(chat, tools=options.get("tools")) == ids
                if "<think>" not in str(chat):  # nothing of it is a control token
                    literal = ours.encode_chat(
                        chat, tools=options.get("tools"), literal_contents=True
                    )
                    assert literal == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(tmp_path: Path, name: str) -> None:
    folder = base(tmp_path)
    config = CONFIG | {"bos_token": "<s>", "mask_token": None, "own_token": "<|own|>"}
    put(folder, "tokenizer_config.json", config | {"chat_template": TEMPLATES[name]})
    same(folder)
    same(folder, tools=TOOLS)


# transformers looks for "content" in the source, which a template that writes all as JSON has not
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "json"])
def test_an_answer_that_is_gone_on_with(tmp_path: Path, name: str) -> None:
    """Texts with blanks, thoughts and what control tokens are made of; where both show them."""
    folder = base(tmp_path)
    config = CONFIG | {"bos_token": "<s>", "mask_token": None, "own_token": "<|own|>"}
    put(folder, "tokenizer_config.json", config | {"chat_template": TEMPLATES[name]})
    theirs, ours = reference(folder), load_tokenizer(folder)
    assert ours is not None
    shown = 0
    for content in (
        "The answer",
        " is \n",
        "a",
        "x\n\ny  ",
        "<b> & |",
        "<think>\nhm\n</think>\n\nso",
    ):
        chat = [USER | {"content": "a"}, BOT | {"content": content}]
        given = {"add_generation_prompt": False, "continue_final_message": True}
        try:
            text = theirs.apply_chat_template(chat, tokenize=False, **given)
        except Exception:
            with pytest.raises(TokenizerError):
                ours.render_chat(chat, continue_final_message=True)
            continue
        shown += 1
        assert ours.render_chat(chat, continue_final_message=True) == text
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **given)
        assert ours.chat_ids(chat, continue_final_message=True) == ids
        if "<think>" not in content:
            literal = ours.chat_ids(chat, continue_final_message=True, literal_contents=True)
            assert literal == ids
    assert bool(shown) == (name not in ODDS)


NAMES = ODDS["names"] + ODDS["names defined"]
FILES: dict[str, dict[str, Any]] = {
    "config": {"tokenizer_config.json": CONFIG | {"chat_template": NAMES, "add_bos_token": True}},
    "a file": {
        "tokenizer_config.json": CONFIG | {"chat_template": "not this one"},
        "chat_template.jinja": NAMES,
    },
    "named": {
        "tokenizer_config.json": CONFIG
        | {
            "chat_template": [
                {"name": "tool_use", "template": "tools!"},
                {"name": "default", "template": NAMES},
            ]
        }
    },
    "named without a default": {
        "tokenizer_config.json": CONFIG | {"chat_template": [{"name": "rag", "template": "no"}]}
    },
    "more files": {
        "tokenizer_config.json": CONFIG | {"chat_template": "not this one"},
        "chat_template.jinja": CHATML,
        "additional_chat_templates/tool_use.jinja": "tools!",
        "additional_chat_templates/rag.jinja": "{{ documents }}",
    },
    "more files without a default": {
        "tokenizer_config.json": CONFIG | {"chat_template": CHATML},
        "additional_chat_templates/rag.jinja": "no",
    },
    "map of texts": {
        "tokenizer_config.json": CONFIG | {"chat_template": NAMES},
        "special_tokens_map.json": {"bos_token": "<s>", "unk_token": "<|end|>"},
    },
    "map of objects": {
        "tokenizer_config.json": CONFIG | {"chat_template": NAMES, "bos_token": "<|end|>"},
        "special_tokens_map.json": {"bos_token": token("<s>"), "sep_token": token("<|im_end|>")},
    },
    "map that nothing reads": {
        "tokenizer_config.json": CONFIG
        | {"chat_template": NAMES, "added_tokens_decoder": {"256": token("<|end|>", special=True)}},
        "special_tokens_map.json": {"bos_token": "<s>"},
    },
    "names of its own": {
        "tokenizer_config.json": CONFIG
        | {"chat_template": NAMES, "extra_special_tokens": {"image_token": "<image>"}}
    },
    "tokens that tokenizer.json lacks": {
        "tokenizer_config.json": CONFIG
        | {
            "chat_template": NAMES + "<|new|><x><y>",
            "bos_token": "<|new|>",
            "additional_special_tokens": ["<x>"],
        }
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": CONFIG
        | {
            "chat_template": NAMES + "<|a|> <|b|>c",
            "added_tokens_decoder": {
                "267": token("<|b|>", special=True),
                "266": token("<|a|>", special=False, rstrip=True),
            },
        }
    },
    "added_tokens.json": {
        "tokenizer_config.json": CONFIG | {"chat_template": NAMES + "<|a|><|b|>"},
        "added_tokens.json": {"<|b|>": 267, "<|a|>": 266},
    },
    "only special_tokens_map": {
        "chat_template.jinja": NAMES,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "<|end|>"},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    folder = base(tmp_path)
    for file, content in FILES[name].items():
        put(folder, file, content)
    same(folder)
    same(folder, tools=TOOLS)
    ours = load_tokenizer(folder)
    assert ours is not None and ours.has_chat_template == ("without a default" not in name)


def test_the_template_of_a_processor_counts_where_there_is_no_other(tmp_path: Path) -> None:
    folder = base(tmp_path)
    put(folder, "tokenizer_config.json", CONFIG)
    put(folder, "chat_template.json", {"chat_template": CHATML})
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.chat_template == CHATML
    put(folder, "tokenizer_config.json", CONFIG | {"chat_template": "this one"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.chat_template == "this one"


def test_a_missing_default_is_named(tmp_path: Path) -> None:
    folder = base(tmp_path)
    put(folder, "additional_chat_templates/rag.jinja", "x")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    with pytest.raises(TokenizerError, match="templates named rag, none named default"):
        tokenizer.encode_chat(CHATS["one"])


def test_empty_keys_and_thoughts(tmp_path: Path) -> None:
    """As in transformers 5.24."""
    folder = base(tmp_path)
    put(folder, "chat_template.jinja", ODDS["keys"].replace("[0]", "[1]"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    chat = [USER | {"content": "a"}, BOT | {"content": None, "thinking": "hm"}]
    assert tokenizer.render_chat(chat) == "thinking=hm;role=assistant;reasoning_content=hm;"


def test_templates_see_plain_data_alone(tmp_path: Path) -> None:
    folder = base(tmp_path)
    put(folder, "chat_template.jinja", "{{ messages[0].content }}{{ messages[0].x.y }}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    chat = [USER | {"content": Path("/secret"), "x": {"y": (1, 2.5, True)}}]
    assert tokenizer.render_chat(chat) == "<PosixPath>[1, 2.5, True]"
