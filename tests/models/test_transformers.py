"""Logits of models that transformers implements too, on random checkpoints that it has saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllmserve import LLM, SamplingParams
from dllmserve.core.plan import Store
from dllmserve.errors import UnsupportedModelError
from dllmserve.models.loader import read_config, read_spec
from tests.helpers import answer
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
    ("name", "block", "more"),
    [
        ("Qwen3MoeForCausalLM", 1, {"decoder_sparse_step": 2, "norm_topk_prob": True}),
        ("SDARMoeForCausalLM", 4, {"mlp_only_layers": [1], "norm_topk_prob": False}),
    ],
)
def test_experts_in_some_layers(
    tmp_path: Path, name: str, block: int, more: dict[str, Any]
) -> None:
    given = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    model = saved(tmp_path, "Qwen3Moe", num_hidden_layers=3, **given, **more)
    rewrite(tmp_path, architectures=[name], mask_token_id=96)
    same(tmp_path, model, block)
    experts = read_spec(read_config(tmp_path)).experts
    assert experts is not None and 0 < sum(experts.layers) < 3


@pytest.mark.parametrize(
    ("kind", "name", "block"),
    [
        ("Qwen3", "SDARForCausalLM", 4),
        ("Qwen2", "Fast_dLLM_QwenForCausalLM", 32),
        ("Llama", "StableDiffcoderForCausalLM", 4),
        ("Qwen3", "DreamForCausalLM", 32),
        ("Llama", "ILLaDAForCausalLM", LENGTH),  # one block: every token sees all
        ("Qwen2", "DreamModel", LENGTH),
        ("Llama", "A2DLlamaLMHeadModel", LENGTH),
        ("Qwen2", "A2DQwen2LMHeadModel", LENGTH),
        ("Qwen3", "A2DQwen3LMHeadModel", LENGTH),
        ("Llama", "A2DLlamaLMHeadModel", 8),
        ("Qwen2", "A2DQwen2LMHeadModel", 8),
        ("Qwen3", "A2DQwen3LMHeadModel", 8),
    ],
)
def test_other_masks(tmp_path: Path, kind: str, name: str, block: int) -> None:
    """The layers are those of the autoregressive model."""
    more = {} if kind == "Qwen3" else {"head_dim": 10}
    model = saved(tmp_path, kind, **more)
    blocks = {"block_size": block} if block == 8 else {}
    rewrite(tmp_path, architectures=[name], mask_token_id=96, **blocks)
    same(tmp_path, model, block)
    spec = read_spec(read_config(tmp_path))
    if block == LENGTH:
        assert (spec.geometry, spec.block_length) == ("full", 0)
    else:
        assert (spec.geometry, spec.block_length) == ("block", block)


@pytest.mark.parametrize("name", ["NemotronLabsDiffusionModel", "MinistralDiffEncoderModel"])
def test_nemotron(tmp_path: Path, name: str) -> None:
    """Ministral 3 with other names: YaRN, and queries that grow with their position."""
    rope = YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0}
    rope |= {"llama_4_scaling_beta": 0.4, "beta_fast": 32.0, "beta_slow": 1.0}
    model = saved(tmp_path, "Ministral3", rope_parameters=rope)

    def new(old: str) -> str:
        return old.replace("model.", "encoder.").replace("lm_head", "diffusion_head")

    path = tmp_path / "model.safetensors"
    save_file({new(old): x.clone() for old, x in load_file(path).items()}, path)
    rewrite(tmp_path, architectures=[name], block_size=32, mask_token_id=96)
    same(tmp_path, model)
    same(tmp_path, model, 32)
    spec = read_spec(read_config(tmp_path))
    assert (spec.geometry, spec.block_length, spec.causal_context) == ("block", 32, True)
    older = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    rewrite(
        tmp_path, rope_parameters="absent", rope_scaling=older, rope_theta=older.pop("rope_theta")
    )
    assert read_spec(read_config(tmp_path)) == spec
    rewrite(tmp_path, rope_scaling=None, dlm_type="dream")
    with pytest.raises(UnsupportedModelError, match="dlm_type='dream' is not supported"):
        read_spec(read_config(tmp_path))
    rewrite(tmp_path, dlm_type="llada")
    with pytest.raises(UnsupportedModelError, match="lacks the field 'rope_parameters'"):
        read_spec(read_config(tmp_path))


@pytest.mark.parametrize(
    ("kind", "name"), [("Llama", "ILLaDAForCausalLM"), ("Qwen3", "A2DQwen3LMHeadModel")]
)
def test_full_attention_is_served(tmp_path: Path, kind: str, name: str) -> None:
    """The first forward's probabilities, and the same answer with K,V that are kept."""
    model = saved(tmp_path, kind, head_dim=10, tie_word_embeddings=True)
    rewrite(tmp_path, architectures=[name], mask_token_id=96)
    llm = LLM(str(tmp_path), device="cpu")
    params = SamplingParams(temperature=0.0, gen_length=16, block_length=8, ignore_eos=True)
    prompt = tokens()[:9]
    canvas = torch.tensor([prompt + [96] * 16])
    with torch.no_grad():
        logits = model(canvas, attention_mask=torch.ones(1, 1, 25, 25).bool()).logits[0, 9:]
    best = logits.softmax(dim=-1)[:, :96].amax(dim=-1)  # the mask is never proposed
    first = next(llm.stream(prompt, params))
    got = torch.tensor([c for c in first.confidence[:8] if c is not None])
    torch.testing.assert_close(got, best[:8], atol=1e-5, rtol=0)
    assert len(answer(llm, prompt, params)) == 16
