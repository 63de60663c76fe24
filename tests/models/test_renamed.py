"""iLLaDA is LLaDA with Llama's names: a golden checkpoint with those gives the golden answers."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dllmserve import LLM
from tests.checkpoints import write
from tests.helpers import GOLDEN, golden, run_cases

FIELDS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
SAME = ("vocab_size", "rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id", "torch_dtype")
#: parts of names, in the order in which they are replaced
PARTS = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
    ".attn_norm": ".input_layernorm",
    ".ff_norm": ".post_attention_layernorm",
    ".attn_out": ".self_attn.o_proj",
    ".q_proj": ".self_attn.q_proj",
    ".k_proj": ".self_attn.k_proj",
    ".v_proj": ".self_attn.v_proj",
    ".ff_proj": ".mlp.gate_proj",
    ".up_proj": ".mlp.up_proj",
    ".ff_out": ".mlp.down_proj",
}


def renamed(name: str) -> str:
    for own, other in PARTS.items():
        name = name.replace(own, other)
    return name


@pytest.mark.parametrize("name", ["llada-kv4of4", "llada-kv2of4"])
def test_golden_answers(tmp_path: Path, name: str) -> None:
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    config = {other: settings[own] for own, other in FIELDS.items()}
    config |= {field: settings[field] for field in SAME if field in settings}
    config["architectures"] = ["ILLaDAForCausalLM"]
    tensors = load_file(GOLDEN / name / "model.safetensors")
    folder = write(tmp_path, config, {renamed(n): t.clone() for n, t in tensors.items()})
    cases = golden(name)
    assert run_cases(LLM(str(folder), device="cpu"), cases) == [case.output for case in cases]
