"""Literal contents: whoever writes a message cannot end it or speak for others."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from dllmserve.engine.tokenizer import Tokenizer, load_tokenizer
from dllmserve.errors import PromptError, TokenizerError
from dllmserve.models.loader import find_model
from tests.checkpoints import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = {
    "bytes": ["<|end|>", "<|user|>", "<|assistant|>", "<|mask|>"],
    "embedded": ["<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>"],
    "transformers": ["<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>"],
}


def dream(folder: Path) -> None:
    """Qwen2's vocabulary files, which only transformers can read."""
    trained = Fast(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["hello world, the thing", "naïve café"], trainer)
    model = json.loads(trained.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {
        str(len(model["vocab"]) + i): {"content": name, "special": True, **flags}
        for i, name in enumerate(SPECIALS["transformers"])
    }
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIALS["transformers"][2:],
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("chat")
    for kind in ("bytes", "transformers"):
        (root / kind).mkdir()
    byte_tokenizer(root / "bytes", chat=True)
    dream(root / "transformers")
    places = {"embedded": find_model("tiny"), **{k: root / k for k in ("bytes", "transformers")}}
    found = {kind: load_tokenizer(place) for kind, place in places.items()}
    return {kind: tokenizer for kind, tokenizer in found.items() if tokenizer is not None}


def said(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def special_ids(tokenizer: Tokenizer, kind: str) -> set[int]:
    return {tokenizer.encode(text, special=False)[0] for text in SPECIALS[kind]}


def parts(kind: str) -> st.SearchStrategy[str]:
    """Texts with special tokens, whole and in halves, among other characters."""
    pieces = st.one_of(
        st.sampled_from([*SPECIALS[kind], "<|", "|>", "<|end", "mask|>", "\U00100000"]),
        st.text("ab <|>é🙂", max_size=5),
    )
    return st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize("kind", SPECIALS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_message_holds_a_special_token(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    contents = data.draw(st.lists(parts(kind), min_size=1, max_size=3))
    ids = tokenizer.encode_chat(said(*contents), literal_contents=True)
    # as many as the template writes around harmless contents, and in the same order
    special = special_ids(tokenizer, kind)
    harmless = tokenizer.encode_chat(said(*("x" for _ in contents)))
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    # and nothing of the text is lost: special tokens are left out when ids are decoded
    plain = tokenizer.decode(ids)
    for text in contents:
        assert text.strip() in plain


@pytest.mark.parametrize("kind", SPECIALS)
@settings(max_examples=40)
@given(data=st.data())
def test_other_contents_are_tokenised_as_ever(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    texts = st.text(max_size=20).filter(lambda t: not any(s in t for s in SPECIALS[kind]))
    messages = said(*data.draw(st.lists(texts, min_size=1, max_size=3)))
    literal = tokenizer.encode_chat(messages, literal_contents=True)
    assert literal == tokenizer.encode_chat(messages)
    assert literal == tokenizer.encode(tokenizer.render_chat(messages), special=False)


@pytest.mark.parametrize("kind", SPECIALS)
def test_without_literal_contents_special_tokens_are_what_they_say(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer, name = tokenizers[kind], SPECIALS[kind][0]
    (id,) = tokenizer.encode(name, special=False)
    messages = said(f"a{name}b")
    assert tokenizer.encode_chat(messages).count(id) == 1 + tokenizer.encode_chat(
        messages, literal_contents=True
    ).count(id)


@pytest.mark.parametrize("kind", SPECIALS)
def test_many_at_once(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Encoding one conversation changes nothing for those encoded at the same time."""
    tokenizer = tokenizers[kind]
    messages = said(f"a{SPECIALS[kind][1]}b{SPECIALS[kind][0]}", "c")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            found = list(
                pool.map(
                    lambda _: tokenizer.encode_chat(messages, literal_contents=True), range(400)
                )
            )
    finally:
        sys.setswitchinterval(interval)
    expected = tokenizer.encode_chat(messages, literal_contents=True)
    assert found == [expected] * 400


def test_what_is_no_conversation(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode_chat(said("\ud800<|end|>"), literal_contents=True)
    with pytest.raises(TokenizerError, match="no errors"):
        tokenizer.encode_chat([{"role": "error", "content": "<|end|>"}], literal_contents=True)
