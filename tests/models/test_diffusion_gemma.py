"""DiffusionGemma's forward: upstream's logits, and the slow twin's on other shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import ModelSpec
from dllmserve.errors import ConfigError, UnsupportedModelError
from dllmserve.models import loader
from dllmserve.models.decoder import CanvasTokens, Decoder
from dllmserve.models.random import random_decoder
from dllmserve.parallel.group import SOLO, Group
from dllmserve.parallel.partition import Partition
from tests.helpers import GOLDEN, golden_raw, need_interpreter
from tests.oracles import diffusion_gemma as oracle
from tests.ordered import use_ordered_products
from tests.parallel.threads import on_all, thread_groups

NAME = "diffusion-gemma-e6"
CPU = torch.device("cpu")


#: a text model in the older spelling, and what that means
OLD = {
    "hidden_size": 40,
    "intermediate_size": 36,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 24,
    "num_global_key_value_heads": 2,
    "num_experts": 8,
    "top_k_experts": 3,
    "sliding_window": 5,
    "vocab_size": 70,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [1, 7],
}
MEANT = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {"2": {"head_dim": 24, "num_key_value_heads": 2}},
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, with second copies of what is shared."""
    folder = tmp_path_factory.mktemp("gemma")
    config = {"architectures": ["DiffusionGemmaForBlockDiffusion"], "text_config": OLD}
    (folder / "config.json").write_text(json.dumps(config | {"canvas_length": 4}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 1]}))
    spec = loader.read_spec(loader.read_config(folder))
    generator, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for weight in loader.outline(Partition(spec)).weights:
        for part in weight.parts:
            if part.name not in tensors:
                drawn = torch.randn(part.shape, generator=generator)
                tensors[part.name] = 1 + 0.3 * drawn if weight.ones else 0.3 * drawn
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    copy = "model.encoder.language_model.layers.0.mlp.up_proj.weight"
    tensors[copy] = torch.zeros(36, 40)
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(
    folder: Path, kernels: str = "torch", group: Group = SOLO, divided: bool = False
) -> Decoder:
    spec = loader.read_spec(loader.read_config(folder))
    partition = Partition(spec, group, expert_parallel=divided)
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "kernels": kernels}
    return loader.load_decoder(folder, partition, max_len=256, **options)


def capped(decoder: Decoder, hidden: Tensor) -> Tensor:
    cap = decoder.spec.logit_cap
    return torch.tanh(hidden @ decoder.head.weight.T / cap) * cap


class Attention:
    """The context of the package's decoder for one request, in the oracle's way.

    It stores K and V unless it is ``filling``.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.filling = spec, False
        self.positions = torch.empty(0)
        self.kept: list[list[oracle.KV]] = [[] for _ in range(spec.num_layers)]

    def begin(self, positions: Tensor, filling: bool) -> None:
        """What the next forward runs."""
        self.positions, self.filling = positions, filling

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See the package's AttentionContext."""
        kept = [*self.kept[layer], (k.clone(), v.clone())]
        if not self.filling:
            self.kept[layer] = kept
        keys, values = (torch.cat(parts) for parts in zip(*kept, strict=True))
        window = self.spec.layers[layer].window
        visible = oracle.sees(self.positions, len(keys), window, self.filling)
        return oracle.attended(q, keys, values, visible, self.spec.scale_of(layer))


class Run:
    """A request: what is encoded stays, canvases are filled behind it."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.context, self.length = decoder, Attention(decoder.spec), 0

    def forward(self, ids: list[int], canvas: CanvasTokens | None, rows: Tensor | None) -> Tensor:
        positions = torch.arange(self.length, self.length + len(ids))
        self.context.begin(positions, canvas is not None)
        return self.decoder(torch.tensor(ids), positions, self.context, rows, canvas)

    def encode(self, ids: list[int]) -> None:
        self.forward(ids, None, None)
        self.length += len(ids)

    def decode(
        self, ids: list[int], thought: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Logits [C, V] of a canvas, or of some rows."""
        table = self.decoder.embedding.weight
        expected = table.new_zeros(len(ids), table.shape[1])
        if thought is not None:
            expected = thought.softmax(dim=-1) @ table
        mine = torch.ones(len(ids), dtype=torch.bool)
        return capped(self.decoder, self.forward(ids, CanvasTokens(mine, expected), rows))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.inference_mode()
def test_upstreams_logits(kernels: str) -> None:
    if kernels == "triton":
        need_interpreter()
    decoder, slow = load(GOLDEN / NAME, kernels), oracle.load(GOLDEN / NAME)
    cases = [case for case in golden_raw(NAME) if case["kind"] == "forward"]
    assert len(cases) == 2
    for case in cases if kernels == "torch" else cases[1:]:  # the interpreter is slow
        run, twin = Run(decoder), oracle.Gemma({"text_config": slow.text}, slow.weights)
        run.encode(case["prompt_ids"])
        twin.encode(case["prompt_ids"])
        thought: Tensor | None = None
        for logits, argmax in (
            ("logits", "argmax"),
            (
                "logits_with_self_conditioning_on_the_first_logits",
                "argmax_with_self_conditioning",
            ),
        ):
            z, expected = run.decode(case["canvas"], thought), torch.tensor(case[logits])
            other = twin.decode(case["canvas"], thought)
            for found in (z, other):
                found = found[case["logits_rows"], : expected.shape[1]]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert z.argmax(dim=-1).tolist() == case[argmax]
            torch.testing.assert_close(z, other, atol=1e-4, rtol=1e-4)
            thought = z
        rows = torch.tensor([1, 4, 15])
        torch.testing.assert_close(
            run.decode(case["canvas"], None, rows),
            run.decode(case["canvas"])[rows],
            atol=1e-5,
            rtol=1e-5,
        )


PROMPT, CANVAS = list(range(10, 23)), [3, 60, 69, 5]


def answers(decoder: Decoder) -> Tensor:
    """Hidden states of a canvas behind a prompt in two parts, and of the next one behind it."""
    run = Run(decoder)
    run.encode(PROMPT[:6])
    run.encode(PROMPT[6:])
    mine, expected = torch.ones(4, dtype=torch.bool), torch.linspace(-1, 1, 160).view(4, 40)
    found = [run.forward(CANVAS, CanvasTokens(mine, expected), None)]
    run.encode(CANVAS)
    found.append(run.forward([8, 9], CanvasTokens(mine[:2], expected[:2]), torch.tensor([1])))
    return torch.cat(found)


@torch.inference_mode()
def test_another_shape(other: Path) -> None:
    """The prompt is longer than the window."""
    run, slow = Run(load(other)), oracle.load(other)
    slow.text |= MEANT
    for part in (PROMPT[:6], PROMPT[6:]):
        run.encode(part)
        slow.encode(part)
    thought: Tensor | None = None
    for _ in range(3):
        z = run.decode(CANVAS, thought)
        torch.testing.assert_close(z, slow.decode(CANVAS, thought), atol=2e-4, rtol=2e-4)
        thought = z / 0.7
    run.encode(CANVAS)
    slow.encode(CANVAS)
    torch.testing.assert_close(run.decode([8, 9]), slow.decode([8, 9]), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_a_step_of_both_kinds(other: Path) -> None:
    """Tokens of a canvas beside tokens that are encoded: what each is made of is its own."""
    decoder, ids, positions = load(other), torch.tensor([5, 6, 5, 6]), torch.tensor([0, 1, 0, 1])
    expected, mine = torch.randn(4, 40), torch.tensor([True, False, False, True])

    class Alone:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    found = decoder(ids, positions, Alone(), None, CanvasTokens(mine, expected))
    filled = decoder(ids, positions, Alone(), None, CanvasTokens(torch.ones_like(mine), expected))
    torch.testing.assert_close(
        found, torch.where(mine[:, None], filled, decoder(ids, positions, Alone()))
    )
    assert not torch.allclose(found[0], found[2], atol=1e-2)


@pytest.mark.parametrize("divided", [False, True])
def test_two_ranks_give_the_same_bits(
    other: Path, divided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_ordered_products(monkeypatch)
    with torch.inference_mode():
        alone = answers(load(other))
    both = on_all(
        [
            lambda group=group: answers(load(other, "torch", group, divided))
            for group in thread_groups(2)
        ]
    )  # type: ignore[misc]
    assert torch.equal(both[0], alone) and torch.equal(both[1], alone)


@pytest.mark.parametrize("divided", [False, True])
def test_random_weights_of_ranks_are_parts_of_the_whole(other: Path, divided: bool) -> None:
    spec = loader.read_spec(loader.read_config(other))
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "max_len": 4}
    whole, *ranks = (
        random_decoder(
            Partition(spec, group, expert_parallel=divided and group is not SOLO), **options
        )
        for group in (SOLO, *thread_groups(2))
    )
    assert all((w.data == 1).all() for w in whole.weights if w.ones)
    mine, parts = (
        [decoder.layers[0].experts.gate_up for decoder in some]  # type: ignore[attr-defined]
        for some in ([whole], ranks)
    )
    halves = [part.unflatten(1, (2, -1)) for part in parts]  # gates, ups
    assert torch.equal(torch.cat(halves, dim=0 if divided else 2).flatten(1, 2), mine[0])
    assert 0.01 < float(mine[0].std()) < 0.03


def test_what_a_config_says(other: Path) -> None:
    config = loader.read_config(other)
    spec = loader.read_spec(config)
    assert (spec.block_length, spec.eos_ids, spec.logit_cap) == (4, (9, 1, 7), 30.0)
    assert [layer.window for layer in spec.layers] == [5, 5, 0]
    assert spec.layers[2].turned == 3 and spec.layers[2].key_is_value
    spelled = {k: v for k, v in OLD.items() if "global" not in k} | MEANT
    assert loader.read_spec(config | {"text_config": spelled}) == spec
    dummy = EngineConfig(load_format="dummy", layers=2, default_block_length=6)
    cut = loader.read_spec(config, dummy)
    assert (cut.num_layers, len(cut.layers), cut.block_length) == (2, 2, 6)
    with pytest.raises(ConfigError, match="layers=2 is over the 1"):
        loader.read_spec(config | {"text_config": OLD | {"num_hidden_layers": 1}}, dummy)
    with pytest.raises(ConfigError, match="mask_id=3 does not work"):
        loader.read_spec(config, EngineConfig(mask_id=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"num_experts": None}, "lacks the field 'num_experts'"),
        ({"top_k_experts": 9}, "9 of 8 experts"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types="),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers"),
        ({"per_layer_config": {"2": {"sliding_window": 4}}}, "per_layer_config of sliding_window"),
        ({"per_layer_config": {"x": {}}}, "wrong type or size"),
        ({"num_global_key_value_heads": 3}, "layer 2: num_attention_heads=4 is not a multiple"),
        ({"global_head_dim": 7}, "layer 2: head_dim=7"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
            "rope_parameters of full_attention",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
    ],
)
def test_what_is_not_run(other: Path, change: dict[str, Any], message: str) -> None:
    config = loader.read_config(other)
    with pytest.raises(UnsupportedModelError, match=message):
        loader.read_spec(config | {"text_config": OLD | change})


@torch.inference_mode()
def test_a_checkpoint_that_transformers_saves(tmp_path: Path) -> None:
    """Full layers in other places, wider ones, another share of turned pairs, another cap."""
    pytest.importorskip("transformers.models.diffusion_gemma")
    import transformers
    from transformers.models.diffusion_gemma import DiffusionGemmaTextConfig

    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 2e5,
            "partial_rotary_factor": 0.5,
        },
    }
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    own = {"final_logit_softcapping": 20.0, "rope_parameters": rope, "layer_types": kinds}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}
    text = DiffusionGemmaTextConfig(**{**OLD, "num_global_key_value_heads": 1, **heads, **own})
    vision = json.loads((GOLDEN / NAME / "config.json").read_text())["vision_config"]
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default wants sizes that are multiples of 16
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if ("scal" in name and "embed" not in name) or "norm" in name:
            x += 0.3 * torch.randn_like(x)
        elif x.dim() > 1:
            x.copy_(0.25 * torch.randn_like(x))
    model.save_pretrained(tmp_path)
    run = Run(load(tmp_path))
    run.encode(PROMPT)
    given = {"input_ids": torch.tensor([PROMPT]), "decoder_input_ids": torch.tensor([CANVAS])}
    first = model(**given).logits
    torch.testing.assert_close(run.decode(CANVAS), first[0], atol=1e-4, rtol=1e-4)
    second = model(**given, self_conditioning_logits=first).logits[0]
    torch.testing.assert_close(run.decode(CANVAS, first[0]), second, atol=1e-4, rtol=1e-4)
