"""Logits of models that transformers implements too, on random checkpoints that it has saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllmserve.core.plan import Store
from tests.models.test_causal_forward import Forwards, chunk, load

transformers = pytest.importorskip("transformers")

LENGTH = 96
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": YARN,
    "yarn, its fields": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, a factor": YARN | {"attention_factor": 1.3},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, shorter": YARN | {"factor": 0.25},
}


def sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
        "eos_token_id": 3,
    } | more


def saved(folder: Path, kind: str, **more: Any) -> Any:
    """A model with random weights, norms too, and its checkpoint."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes(**more))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


def tokens() -> list[int]:
    ids: list[int] = torch.randint(0, 97, (LENGTH,), generator=torch.manual_seed(1)).tolist()
    return ids


def same(folder: Path, model: Any, block: int = 1) -> None:
    ids = tokens()
    place = torch.arange(LENGTH) // block
    mask = (place[None, :] <= place[:, None])[None, None]
    with torch.no_grad():
        expected: Tensor = model(torch.tensor([ids]), attention_mask=mask).logits[0]
    got = Forwards(load(folder)).logits(ids, chunk(0, LENGTH, block, Store.NONE))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_rotary_scaling(tmp_path: Path, kind: str, rope: str) -> None:
    """In files as transformers 5 writes them, and as transformers 4 did."""
    theta = 3000.0
    model = saved(tmp_path, kind, rope_parameters=ROPES[rope] | {"rope_theta": theta})
    same(tmp_path, model)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    older = dict(ROPES[rope])
    older["type"] = older.pop("rope_type")
    rewrite(tmp_path, rope_parameters="absent", rope_theta=theta, rope_scaling=older)
    same(tmp_path, model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_tied_heads(tmp_path: Path, kind: str, tied: bool) -> None:
    more = {"head_dim": 10} if kind == "Qwen2" else {}
    same(tmp_path, saved(tmp_path, kind, tie_word_embeddings=tied, **more))


@pytest.mark.parametrize(
    ("kind", "name", "block"),
    [("Qwen3", "SDARForCausalLM", 4), ("Qwen2", "Fast_dLLM_QwenForCausalLM", 32)],
)
def test_a_block_causal_mask(tmp_path: Path, kind: str, name: str, block: int) -> None:
    """The layers are those of the autoregressive model."""
    more = {"head_dim": 10} if kind == "Qwen2" else {}
    model = saved(tmp_path, kind, **more)
    rewrite(tmp_path, architectures=[name], mask_token_id=96)
    same(tmp_path, model, block)


def renamed(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): x.clone() for name, x in load_file(path).items()}, path)
