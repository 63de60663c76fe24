"""Tokenizers as checkpoints ship them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dllmserve.engine.tokenizer import load_tokenizer
from dllmserve.errors import TokenizerError

TEXT = "hello café 日本 world"


@pytest.fixture
def dream_files(tmp_path: Path) -> tuple[Path, Tokenizer]:
    """Dream's layout: Qwen2's two vocabulary files, and a class of its own that is not here."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["hello world, the thing", "naïve café 日本"], trainer)
    model = json.loads(trained.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    size = len(model["vocab"])
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {
        str(size + i): {"content": name, "special": True, **flags}
        for i, name in enumerate(("<|endoftext|>", "<|mask|>"))
    }
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path, trained


@pytest.mark.parametrize("trust", [False, True])
def test_dreams_vocabulary_needs_no_code_of_its_own(
    dream_files: tuple[Path, Tokenizer], trust: bool
) -> None:
    folder, trained = dream_files
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)  # warnings would be errors
    assert tokenizer is not None
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.encode("<|mask|>") == [trained.get_vocab_size() + 1]
    assert tokenizer.decode(tokenizer.encode(TEXT + "<|endoftext|>")) == TEXT
    assert tokenizer.render_chat([{"content": "a"}, {"content": "b"}]) == "a"


def test_a_tokenizer_of_unknown_kind_asks_for_trust(
    dream_files: tuple[Path, Tokenizer],
) -> None:
    folder, _ = dream_files
    (folder / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="trust_remote_code"):
        load_tokenizer(folder)
