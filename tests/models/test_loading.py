"""Checkpoints: what loads, and what each broken one is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dllmserve import LLM, SamplingParams
from dllmserve.config import EngineConfig
from dllmserve.core.model_spec import NO_MASK
from dllmserve.engine.setup import plan_engine
from dllmserve.errors import (
    ConfigError,
    DllmServeError,
    ModelError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
    WeightsError,
)
from dllmserve.models import loader
from dllmserve.models.loader import ASSETS, find_model
from tests.checkpoints import Config, Shape, Tensors, config, random_tensors, write
from tests.helpers import GOLDEN, answer

Edit = Callable[[Config, Tensors], None]
LLADA = Shape(family="llada")
DREAM = Shape(family="dream")
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
Q = "model.transformer.blocks.0.q_proj.weight"


def broken(folder: Path, edit: Edit, shape: Shape = LLADA) -> Path:
    """A checkpoint of which one thing is wrong."""
    settings, tensors = config(shape), random_tensors(shape)
    edit(settings, tensors)
    return write(folder, settings, tensors)


def refused(folder: Path | str, kind: type[DllmServeError], *parts: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        LLM(str(folder), device="cpu", **options)
    for part in parts:
        assert part in str(caught.value)


def works(folder: Path, **options: Any) -> None:
    llm = LLM(str(folder), device="cpu", **options)
    params = SamplingParams(temperature=0.0, gen_length=4, steps=2, ignore_eos=True)
    assert len(answer(llm, [1, 2], params)) == 4


def test_no_such_directory(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "./absent", "absent", "a/b/c", "~/no/such"):
        refused(name, ModelNotFoundError, repr(name), "local directory", "'tiny'")
    with pytest.raises(FileNotFoundError):
        LLM("./absent")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    refused(file, ModelNotFoundError, "is a file", "directory that holds config.json")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_args: object, **_kwargs: object) -> str:
        raise OSError("no route to the hub\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/some-model", ModelNotFoundError, "'someone/some-model'", "no route to the hub")


def test_a_hub_id_is_fetched_without_pickles_or_code(
    monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetched(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(checkpoints["llada"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    works(Path("someone/some-model"))
    assert asked["name"] == "someone/some-model"
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in asked["allow_patterns"])


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, ModelNotFoundError, "has no config.json")


@pytest.mark.parametrize("text", ["{", "", "\xff\xfe"])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, UnsupportedModelError, "config.json is not valid JSON")


def test_json_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, UnsupportedModelError, "must hold a JSON object")


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], ["llada"], [["nested"]], [3]])
def test_unsupported_architecture(tmp_path: Path, names: list[Any]) -> None:
    folder = broken(tmp_path, lambda c, _: c.update(architectures=names))
    parts = [f"architecture {names[0]!r}", "supported architectures: ", "DreamModel"]
    refused(folder, UnsupportedModelError, *parts)


@pytest.mark.parametrize("names", [None, [], "LLaDAModelLM"])
def test_no_architecture(tmp_path: Path, names: Any) -> None:
    folder = broken(tmp_path, lambda c, _: c.update(architectures=names))
    refused(folder, UnsupportedModelError, "no 'architectures'", "LLaDAModelLM")


@pytest.mark.parametrize("shape", [LLADA, DREAM], ids=["llada", "dream"])
def test_missing_fields_are_named(tmp_path: Path, shape: Shape) -> None:
    needed = {
        "llada": ["d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length"],
        "dream": ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"],
    }
    for name in [*needed[shape.family], "mask_token_id"]:
        folder = tmp_path / name
        broken(folder, lambda c, _, name=name: c.pop(name), shape)  # type: ignore[misc]
        refused(folder, UnsupportedModelError, config(shape)["architectures"][0], repr(name))


@pytest.mark.parametrize(
    ("shape", "change", "parts"),
    [
        (LLADA, {"block_type": "sequential"}, ["block_type='sequential'", "only 'llama'"]),
        (LLADA, {"alibi": True}, ["alibi=True"]),
        (LLADA, {"rope_scaling": {"type": "linear"}}, ["rope_scaling"]),
        (LLADA, {"n_heads": 5}, ["d_model=32 is not a multiple of n_heads=5"]),
        (LLADA, {"n_kv_heads": 3}, ["n_heads=4 is not a multiple of n_kv_heads=3"]),
        (LLADA, {"embedding_size": 60}, ["embedding_size=60 is under vocab_size=61"]),
        (LLADA, {"mask_token_id": 61}, ["mask_token_id=61 is outside the 61 embeddings"]),
        (LLADA, {"n_layers": 0}, ["num_layers is 0"]),
        (LLADA, {"n_layers": 10**6}, ["num_layers is 1000000", "at most 10000"]),
        (LLADA, {"vocab_size": 10**18, "embedding_size": 10**18}, ["no memory could hold"]),
        (LLADA, {"vocab_size": 10**30}, ["vocab_size is 1000000000000000000000000000000"]),
        (LLADA, {"d_model": 2**60}, ["no memory could hold"]),
        (DREAM, {"head_dim": 2**62}, ["no memory could hold"]),
        (LLADA, {"vocab_size": -3, "embedding_size": 61}, ["vocab_size is -3"]),
        (LLADA, {"d_model": "wide"}, ["wide"]),
        (LLADA, {"mask_token_id": [3]}, ["config.json"]),
        (LLADA, {"eos_token_id": "end"}, ["end"]),
        (DREAM, {"use_sliding_window": True}, ["use_sliding_window"]),
        (DREAM, {"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
        (DREAM, {"num_key_value_heads": 3}, ["num_key_value_heads=3"]),
        (DREAM, {"hidden_size": 33}, ["hidden_size=33", "num_attention_heads=4"]),
        (DREAM, {"rope_parameters": {"rope_type": "yarn"}}, ["rope_type='yarn'"]),
        (DREAM, {"vocab_size": None}, ["'vocab_size'"]),
        (LLADA, {"n_heads": 0}, ["wrong type or size", "zero"]),
        (DREAM, {"num_attention_heads": 0}, ["wrong type or size", "zero"]),
        (LLADA, {"n_layers": float("inf")}, ["wrong type or size", "infinity"]),
        (LLADA, {"rope_parameters": [1]}, ["wrong type or size"]),
        (LLADA, {"mlp_hidden_size": -3}, ["mlp_size is -3"]),
        (LLADA, {"max_sequence_length": -5}, ["max_model_len is -5"]),
        (LLADA, {"rope_theta": -1.0}, ["rope_theta is -1.0"]),
        (LLADA, {"rope_theta": float("nan")}, ["rope_theta is nan"]),
        (LLADA, {"rms_norm_eps": -1.0}, ["norm_eps is -1.0"]),
        (DREAM, {"head_dim": -8}, ["head_dim is -8"]),
        (DREAM, {"head_dim": 7}, ["head_dim=7 is odd"]),
    ],
)
def test_configs_that_we_do_not_run(
    tmp_path: Path, shape: Shape, change: Config, parts: list[str]
) -> None:
    refused(broken(tmp_path, lambda c, _: c.update(change), shape), UnsupportedModelError, *parts)


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("qwen3-kv2of4", {"attention_bias": True}, ["attention_bias=True"]),
        ("llama-kv2of4", {"mlp_bias": True}, ["mlp_bias=True"]),
        ("qwen2-kv2of4", WINDOW, ["sliding_window=9"]),
        ("sdar-kv2of4", {"block_size": -4}, ["block size is -4"]),
        ("sdar-kv2of4", {"mask_token_id": None}, ["mask_token_id=151669 is outside the 151"]),
        ("fdv2-kv2of4", {"mask_token_id": -1}, ["mask_token_id=-1 is outside"]),
        ("llada2-g4e8", {"norm_head": True}, ["norm_head=True"]),
        ("llada2-g4e8", {"score_function": "softmax"}, ["score_function='softmax'"]),
        ("llada2-g4e8", {"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ("llada2-g4e8", {"expert_capacity": 1}, ["expert_capacity=1", "2 experts of a token"]),
        ("llada2-g4e8", {"expert_capacity": 9}, ["expert_capacity=9", "at most all 8"]),
        ("llada2-g4e8", {"delete_token_id": 159}, ["delete_token_id=159 is the mask's"]),
        ("llada2-g4e8", {"split_token_id": 160}, ["split_token_id=160", "vocabulary 0..159"]),
        ("llada2-g4e8", {"n_group": 3}, ["2 of 8 experts", "in 2 of 3 groups"]),
        ("llada2-g4e8", {"num_experts_per_tok": 5}, ["5 of 8 experts", "2 of 4 groups"]),
        ("llada2-g4e8", {"partial_rotary_factor": 0.2}, ["rotary_dim=3 is odd"]),
        ("llada2-g4e8", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor=1.5"]),
        ("llada2-g4e8", {"rope_scaling": {"type": "longrope"}}, ["rope_type='longrope'"]),
        ("llada2-g4e8", {"moe_intermediate_size": None}, ["'moe_intermediate_size'"]),
        ("llada-moe-e8", {"clip_qkv": 8.0}, ["clip_qkv=8.0"]),
        ("llada-moe-e8", {"moe_layer_freq": 1}, ["moe_layer_freq=1", "each of the 2 layers"]),
        ("llada-moe-variant", {"dense_intermediate_size": None}, ["'dense_intermediate_size'"]),
        ("qwen3moe-kv2of4", {"num_experts": 1}, ["2 of 1 experts"]),
        ("qwen3moe-kv2of4", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ],
)
def test_block_causal_and_autoregressive_configs(
    tmp_path: Path, name: str, change: Config, parts: list[str]
) -> None:
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    refused(write(tmp_path, settings | change, {}), UnsupportedModelError, *parts)


def test_defaults_of_published_files() -> None:
    """Without a mask id or a block size; Qwen3 without a head size."""
    large = {"vocab_size": 157184, "mask_token_id": None, "bd_size": None, "block_size": None}
    for name, architecture, block, mask_id in (
        ("fdv2-kv2of4", None, 32, 151665),
        ("sdar-kv2of4", None, 4, 151669),
        ("llama-kv2of4", "StableDiffcoderForCausalLM", 4, 5),
        ("llama-kv2of4", "ILLaDAForCausalLM", 0, 5),
        ("qwen3-kv2of4", "A2DQwen3LMHeadModel", 0, 151669),
        ("sdarmoe-kv2of4", None, 4, 151669),
        ("llada2-g4e8", None, 32, 156895),
        ("llada-moe-e8", None, 0, 156895),
    ):
        settings = json.loads((GOLDEN / name / "config.json").read_text()) | large
        if architecture is not None:
            settings["architectures"] = [architecture]
        spec = loader.read_spec(settings)
        assert (spec.block_length, spec.mask_id) == (block, mask_id)
        assert spec.geometry == ("block" if block else "full")
    for name in ("llada2-g4e8", "llada-moe-e8"):
        settings = json.loads((GOLDEN / name / "config.json").read_text()) | large
        assert loader.read_spec(settings | {"eos_token_id": None}).eos_ids == (156892,)
    settings = json.loads((GOLDEN / "qwen3-kv2of4" / "config.json").read_text())
    del settings["head_dim"]
    spec = loader.read_spec(settings)
    assert (spec.head_dim, spec.geometry, spec.mask_id) == (128, "causal", NO_MASK)
    assert spec.fed_mask_id == 0  # an embedding, which nothing looks at


def test_llada_with_the_names_of_transformers() -> None:
    settings = config(LLADA) | {"n_kv_heads": 2, "mlp_hidden_size": 40}
    other = dict(settings)
    for own, name in (
        ("d_model", "hidden_size"),
        ("n_heads", "num_attention_heads"),
        ("n_kv_heads", "num_key_value_heads"),
        ("n_layers", "num_hidden_layers"),
        ("mlp_hidden_size", "intermediate_size"),
        ("max_sequence_length", "max_position_embeddings"),
        ("weight_tying", "tie_word_embeddings"),
    ):
        other[name] = other.pop(own)
    assert loader.read_spec(other) == loader.read_spec(settings)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    def edit(_: Config, tensors: Tensors) -> None:
        del tensors[Q]
        tensors["model.transformer.extra.weight"] = torch.zeros(2)
        name = "model.transformer.ln_f.weight"
        tensors[name] = torch.zeros(31)

    refused(
        broken(tmp_path, edit),
        WeightsError,
        str(tmp_path),
        f"missing: {Q}",
        "unexpected: model.transformer.extra.weight",
        "misshapen: model.transformer.ln_f.weight is (31,), expected (32,)",
    )


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    def edit(_: Config, tensors: Tensors) -> None:
        tensors[Q] = tensors[Q].to(torch.int8)

    refused(
        broken(tmp_path, edit),
        WeightsError,
        f"unusable: {Q} is I8, expected F32, BF16 or F16",
    )


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path, lambda _, __: None)
    (first,) = folder.glob("*.safetensors")
    shutil.copy(first, folder / "model-copy.safetensors")
    works(folder)  # model.safetensors is the whole model
    first.rename(folder / "other.safetensors")
    refused(folder, WeightsError, "unusable: ", "is in more than one file")


def test_the_embedded_model_does_not_depend_on_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny") == ASSETS / "tiny"
    assert find_model("./tiny") == Path("tiny")


def test_long_lists_of_tensors_are_cut(tmp_path: Path) -> None:
    def edit(_: Config, tensors: Tensors) -> None:
        for name in [n for n in tensors if ".blocks." in n]:
            del tensors[name]

    refused(broken(tmp_path, edit), WeightsError, "missing: ", "and 12 more")


def test_rotary_tables_and_a_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    def edit(settings: Config, tensors: Tensors) -> None:
        tensors["model.transformer.rotary_emb.inv_freq"] = torch.zeros(4)
        settings["weight_tying"] = True

    works(broken(tmp_path, edit))


def test_truncated_and_foreign_safetensors(tmp_path: Path) -> None:
    folder = broken(tmp_path, lambda _c, _t: None)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"not a tensor file at all"):
        file.write_bytes(content)
        refused(folder, WeightsError, str(file), "cannot be read")


def test_bin_only(tmp_path: Path) -> None:
    folder = broken(tmp_path, lambda _c, _t: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, WeightsError, ".bin", "convert them to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, WeightsError, "no .safetensors weights", "load_format='dummy'")
    works(folder, load_format="dummy")


def test_index_with_absent_shards(tmp_path: Path) -> None:
    folder = write(tmp_path, config(LLADA), random_tensors(LLADA), shards=3)
    works(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, WeightsError, "model-00002-of-00003.safetensors", "index")


@pytest.mark.parametrize(
    "content", [{"weight_map": {}}, {}, {"weight_map": [1]}, {"weight_map": {"a": 3}}]
)
def test_a_useless_index(tmp_path: Path, content: Any) -> None:
    folder = write(tmp_path, config(LLADA), random_tensors(LLADA), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(folder, WeightsError, "index")


def test_a_broken_index(tmp_path: Path) -> None:
    folder = write(tmp_path, config(LLADA), random_tensors(LLADA), shards=2)
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, ModelError, "model.safetensors.index.json is not valid JSON")


def test_half_precision_checkpoints_load_as_asked(tmp_path: Path) -> None:
    tensors = {n: t.bfloat16() for n, t in random_tensors(DREAM).items()}
    folder = write(tmp_path, config(DREAM) | {"torch_dtype": "bfloat16"}, tensors)
    assert LLM(str(folder), device="cpu").plan.dtype == torch.float32
    for dtype in ("bfloat16", "float16"):
        llm = LLM(str(folder), device="cpu", dtype=dtype)
        assert llm.plan.dtype == getattr(torch, dtype)
        params = SamplingParams(gen_length=6, steps=3, seed=1, ignore_eos=True, cache="dual")
        assert len(answer(llm, [1, 2], params)) == 6


def test_end_ids_are_collected(tmp_path: Path) -> None:
    folder = broken(tmp_path, lambda c, _: c.update(eos_token_id=[7, 9]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert loader.read_spec(loader.read_config(folder)).eos_ids == (7, 9, 3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert loader.read_spec(loader.read_config(folder)).eos_ids == (7, 9, 2)


@pytest.mark.parametrize("ids", [[[1]], {"a": 1}, "end"])
def test_end_ids_that_are_none(tmp_path: Path, ids: Any) -> None:
    folder = broken(tmp_path, lambda _c, _t: None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    refused(folder, UnsupportedModelError, "wrong type")


def test_parameters_are_counted_as_loaded(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        spec = loader.read_spec(loader.read_config(folder))
        plan = plan_engine(EngineConfig(model=str(folder), device="cpu"))
        decoder = loader.load_decoder(
            folder,
            plan.partition,
            dtype=torch.float32,
            device=torch.device("cpu"),
            max_len=8,
        )
        assert sum(weight.data.numel() for weight in decoder.weights) == spec.parameters()


@pytest.mark.parametrize(
    ("options", "kind", "parts"),
    [
        ({"max_model_len": 257}, ConfigError, ["max_model_len=257", "256 positions"]),
        ({"dtype": "int8"}, ConfigError, ["dtype", "'int8'", "bfloat16"]),
        ({"attention": "flash"}, ConfigError, ["attention", "'flash'", "'sdpa'"]),
        ({"load_format": "pickle"}, ConfigError, ["load_format", "'pickle'", "'dummy'"]),
        ({"tensor_parallel_size": 3}, ConfigError, ["tensor_parallel_size=3", "heads", "1, 2"]),
        ({"tensor_parallel_size": 0}, ConfigError, ["tensor_parallel_size", ">= 1", "got 0"]),
        ({"max_num_seqs": 0}, ConfigError, ["max_num_seqs", ">= 1", "got 0"]),
        ({"max_num_seqs": True}, ConfigError, ["max_num_seqs", "True (bool)"]),
        ({"max_logit_rows": 1}, ConfigError, ["max_logit_rows", ">= 2", "got 1"]),
        ({"page_size": 1.5}, ConfigError, ["page_size", "1.5 (float)"]),
        ({"kv_pages": -1}, ConfigError, ["kv_pages", ">= 0", "got -1"]),
        ({"max_num_batched_tokens": 1}, ConfigError, ["max_num_batched_tokens", ">= 2", "got 1"]),
        ({"gpu_memory_utilization": 0.0}, ConfigError, ["gpu_memory_utilization", "(0, 1]"]),
        ({"gpu_memory_utilization": 1.5}, ConfigError, ["(0, 1]", "got 1.5"]),
        ({"gpu_memory_utilization": float("nan")}, ConfigError, ["got nan"]),
        ({"seed": -1}, ConfigError, ["seed", "got -1"]),
        ({"enforce_eager": 1}, ConfigError, ["enforce_eager", "True or False", "1 (int)"]),
        ({"trust_remote_code": "no"}, ConfigError, ["trust_remote_code", "'no' (str)"]),
        ({"kv_pages": 10**9}, OutOfMemoryError, ["K,V pages", "reduce max_model_len", "kv_pages"]),
        ({"max_logit_rows": 10**9}, OutOfMemoryError, ["logits", "max_logit_rows"]),
        (
            {"gpu_memory_utilization": 1e-9},
            OutOfMemoryError,
            ["may use 0.0 MiB", "set gpu_memory_utilization=0.01"],
        ),
        ({"phases": "both"}, ConfigError, ["phases", "'both'", "mixed"]),
        ({"steps_per_sync": 0}, ConfigError, ["steps_per_sync", "0"]),
        ({"max_graphs": 0}, ConfigError, ["max_graphs", "0"]),
        ({"kernels": "cuda"}, ConfigError, ["kernels", "'cuda'", "triton"]),
    ],
)
def test_engine_options(
    checkpoints: dict[str, Path],
    options: dict[str, Any],
    kind: type[DllmServeError],
    parts: list[str],
) -> None:
    refused(checkpoints["llada"], kind, *parts, **options)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "", 3, "cpu:x"])
def test_devices(checkpoints: dict[str, Path], device: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        LLM(str(checkpoints["llada"]), device=device)


@pytest.mark.parametrize("model", ["", None, 3])
def test_model_names(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be"):
        LLM(model)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_running_out_of_memory_while_loading(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("dllmserve.engine.setup.KVStore.create", full)
    refused(checkpoints["llada"], OutOfMemoryError, "while loading", "weights ", "max_model_len")
