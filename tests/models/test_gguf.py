"""GGUF files become checkpoints: their numbers, their tokenizer, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dllmserve import LLM, SamplingParams
from dllmserve.errors import (
    ConfigError,
    DllmServeError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
    WeightsError,
)

pytest.importorskip("gguf", reason="needs the extra gguf")

from dllmserve.models.gguf_convert import _llama3, convert
from dllmserve.models.gguf_file import TYPES, unpermuted
from tests.gguf_files import HEAD, HEADS, KV, TOKENS, matrices, write


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: i and i + half of a head become 2i and 2i + 1."""
    size, half = len(rows) // heads, len(rows) // heads // 2
    order = [h * size + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
    return rows[order]


def test_rows_come_back() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(unpermuted(permuted(rows, 3), 3), rows)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_package(tmp_path: Path, kind: str) -> None:
    numbers = write(tmp_path / "a.gguf", kind)
    own = {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")
    assert convert(tmp_path / "a.gguf", tmp_path / "own") == own
    convert(tmp_path / "a.gguf", tmp_path / "wide", dtype="float32")
    found = load_file(tmp_path / "wide" / "model.safetensors")
    assert len(found) == len(numbers)
    inner = found["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(permuted(inner, KV), torch.tensor(numbers["blk.1.attn_k.weight"]))
    inner = found["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(permuted(inner, HEADS), torch.tensor(numbers["blk.1.attn_q.weight"]))
    for name, ours in (("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm")):
        values = torch.tensor(numbers[f"blk.0.{name}.weight"])
        assert torch.equal(found[f"model.layers.0.{ours}.weight"], values)
    for name, tensor in load_file(tmp_path / "own" / "model.safetensors").items():
        assert torch.equal(tensor, found[name].to(getattr(torch, own)))


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """A model that transformers saved, and a GGUF file with its numbers."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "a")
    config = transformers.LlamaConfig(**json.loads((tmp_path / "a/config.json").read_text()))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float().eval()
    tensors = dict[str, np.ndarray]()
    state = model.state_dict()
    names = {"attn_q": ("self_attn.q_proj", HEADS), "attn_k": ("self_attn.k_proj", KV)}
    names |= {"attn_v": ("self_attn.v_proj", 0), "attn_output": ("self_attn.o_proj", 0)}
    names |= {f"ffn_{n}": (f"mlp.{n}_proj", 0) for n in ("gate", "up", "down")}
    names |= {"attn_norm": ("input_layernorm", 0), "ffn_norm": ("post_attention_layernorm", 0)}
    for layer in range(config.num_hidden_layers):
        for name, (ours, heads) in names.items():
            rows = state[f"model.layers.{layer}.{ours}.weight"] * (3 if heads else 1)
            state[f"model.layers.{layer}.{ours}.weight"].copy_(rows)
            rows = permuted(rows, heads) if heads else rows
            tensors[f"blk.{layer}.{name}.weight"] = rows.numpy()
    tensors["token_embd.weight"] = state["model.embed_tokens.weight"].numpy()
    tensors["output_norm.weight"] = state["model.norm.weight"].numpy()
    write(tmp_path / "b.gguf", tensors=tensors)
    convert(tmp_path / "b.gguf", tmp_path / "b", most=300_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    prompt = [5, 9, 77, 30, 12]
    params = SamplingParams(gen_length=12, temperature=0)
    answer = LLM(str(tmp_path / "b"), device="cpu").generate([prompt], params)[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in answer["token_ids"]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(answer["token_ids"]) == ids[len(prompt) :]


def test_a_tokenizer_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", tokenizer__ggml__add_bos_token=True)
    convert(tmp_path / "a.gguf", tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert tokenizer.encode("he 12</s>").tokens == ["<s>", "he", "Ġ", "1", "2", "</s>"]
    text = "ünï ½ 😀\n\tx"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_a_head_ends_and_rope(tmp_path: Path) -> None:
    factors = _llama3(8.0, HEAD, 10000.0).numpy()
    more = {"output.weight": np.ones((len(TOKENS), 256), np.float32), "rope_freqs.weight": factors}
    write(tmp_path / "a.gguf", tensors=matrices() | more, tokenizer__ggml__eot_token_id=3)
    convert(tmp_path / "a.gguf", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert not config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5
    assert config["rope_scaling"]["factor"] == 8.0
    ends = json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [len(TOKENS) - 1, 3]


def without(name: str) -> dict[str, np.ndarray]:
    return {n: t for n, t in matrices().items() if n != name}


REFUSED: dict[str, tuple[dict[str, Any], type[DllmServeError], str]] = {
    "architecture": ({"architecture": "qwen2"}, UnsupportedModelError, "'qwen2'.*'llama' are"),
    "parts": ({"split__count": 2}, UnsupportedModelError, "one of 2 parts"),
    "type": ({"kind": "Q5_0"}, UnsupportedModelError, "Q5_0; these.*F32, .*Q6_K"),
    "experts": ({"llama__expert_count": 8}, UnsupportedModelError, "has experts"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, UnsupportedModelError, "'yarn'"),
    "field": ({"llama__block_count": None}, UnsupportedModelError, "no field llama.block_count"),
    "rotary": ({"llama__rope__dimension_count": 32}, UnsupportedModelError, "32 of 64"),
    "pre": ({"tokenizer__ggml__pre": "qwen2"}, TokenizerError, "'qwen2'.*smollm"),
    "kind": ({"tokenizer__ggml__model": "llama"}, TokenizerError, "'llama'.*SentencePiece"),
    "merges": ({"tokenizer__ggml__merges": ["h zz"]}, TokenizerError, "do not fit"),
    "bos": ({"tokenizer__ggml__bos_token_id": 999}, TokenizerError, "bos token 999"),
    "missing": ({"tensors": without("output_norm.weight")}, WeightsError, "output_norm"),
    "bias": (
        {"tensors": matrices() | {"blk.0.attn_q.bias": np.ones(256, np.float32)}},
        UnsupportedModelError,
        "attn_q.bias",
    ),
    "frequencies": (
        {"tensors": matrices() | {"rope_freqs.weight": np.full(HEAD // 2, 2, np.float32)}},
        UnsupportedModelError,
        "is not Llama 3's",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    options, error, words = REFUSED[name]
    write(tmp_path / "a.gguf", **options)
    with pytest.raises(error, match=words):
        convert(tmp_path / "a.gguf", tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_other_files(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for length in (4, 20, 500, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=re.escape("cut.gguf")):
            convert(tmp_path / "cut.gguf", tmp_path / "out")
    (tmp_path / "b.gguf").write_bytes(b"PK\3\4 zip")
    with pytest.raises(WeightsError, match="no GGUF file"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
    (tmp_path / "c-00001-of-00002.gguf").write_bytes(whole)
    with pytest.raises(UnsupportedModelError, match="one of 2 parts"):
        convert(tmp_path / "c-00001-of-00002.gguf", tmp_path / "out")
    with pytest.raises(ModelNotFoundError, match="no file"):
        convert(tmp_path / "gone.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype"):
        convert(tmp_path / "a.gguf", tmp_path / "out", dtype="int8")


def test_a_directory_in_use(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path / "a.gguf", out)
    with pytest.raises(ConfigError, match="--force"):
        convert(tmp_path / "a.gguf", out)
    (out / "old").write_text("x")
    convert(tmp_path / "a.gguf", out, force=True)
    assert not (out / "old").exists()
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint"):
        convert(tmp_path / "a.gguf", out, force=True)


def test_all_or_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "a.gguf", tmp_path / "out", report=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    tensors = matrices()
    tensors["blk.0.ffn_up.weight"][0, 0] = 1e6
    write(tmp_path / "a.gguf", tensors=tensors)
    with pytest.raises(WeightsError, match=r"ffn_up.*float16 does not hold"):
        convert(tmp_path / "a.gguf", tmp_path / "a", dtype="float16")
