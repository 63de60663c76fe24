"""Checkpoint directories as people have them: those that load, and what the others are told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dllmserve import LLM, SamplingParams
from dllmserve.cli.main import main
from dllmserve.core.model_spec import RopeScaling
from dllmserve.errors import (
    DllmServeError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)
from dllmserve.models.config import rope, rope_theta
from dllmserve.models.loader import read_spec
from tests.checkpoints import Config, Shape, Tensors, byte_tokenizer, config, random_tensors, write
from tests.helpers import answer

LLADA, DREAM = Shape(family="llada"), Shape(family="dream")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
INDEX = "model.safetensors.index.json"
Edit = Callable[[Path], None]


def checkpoint(folder: Path, shards: int = 1, shape: Shape = LLADA, **changes: Any) -> Path:
    return write(folder, config(shape) | changes, random_tensors(shape), shards)


def ids(folder: Path) -> list[int]:
    params = SamplingParams(temperature=0.0, gen_length=6, steps=3, ignore_eos=True)
    return answer(LLM(str(folder), device="cpu"), [1, 2], params)


def put(folder: Path, name: str, content: str | bytes = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def tensors(folder: Path, name: str, **given: torch.Tensor) -> None:
    save_file(given, folder / name)


def other_weights(folder: Path) -> None:
    """The same tensors, with other values, which must not be read."""
    other = {name: tensor + 1 for name, tensor in random_tensors(LLADA).items()}
    save_file(other, folder / "model-00001-of-00001.safetensors")


def stale_index(folder: Path) -> None:
    names = dict.fromkeys(random_tensors(LLADA), "model-00002-of-00003.safetensors")
    put(folder, INDEX, json.dumps({"weight_map": names}))


BESIDE: dict[str, Edit] = {
    "an adapter": lambda f: tensors(f, "adapter_model.safetensors", x=torch.zeros(2)),
    "a consolidated file": lambda f: tensors(f, "consolidated.safetensors", x=torch.zeros(2)),
    "an old shard": other_weights,
    "a copy": lambda f: shutil.copy(f / "model.safetensors", f / "model-copy.safetensors") and None,
    "a stale index": stale_index,
    "an index that is no JSON": lambda f: put(f, INDEX, "{"),
    "a pointer": lambda f: put(f, "model-00001-of-00002.safetensors", POINTER),
    "pickles": lambda f: put(f, "training_args.bin", b"\x80"),
    "GGUF": lambda f: put(f, "model-q4.gguf", b"GGUF"),
    "a download of something else": lambda f: put(f, "tokenizer.json.incomplete"),
    "a broken link": lambda f: (f / "model-00001-of-00002.safetensors").symlink_to(f / "no"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_whole_file_counts_whatever_lies_beside_it(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "model")
    expected = ids(folder)
    BESIDE[name](folder)
    assert ids(folder) == expected


def test_an_index_counts_among_shards(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, shards=3)
    expected = ids(folder)
    tensors(folder, "adapter_model.safetensors", x=torch.zeros(2))
    other_weights(folder)
    assert ids(folder) == expected


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, shards=2)
    expected = ids(folder)
    (folder / INDEX).unlink()
    tensors(folder, "adapter_model.safetensors", x=torch.zeros(2))
    assert ids(folder) == expected
    other_weights(folder)
    refused(folder, WeightsError, "shards of several saves", INDEX, "of-00001")
    (folder / "model-00001-of-00001.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, WeightsError, "lacks weight files", "model-00002-of-00002.safetensors")


def test_a_file_of_another_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    expected = ids(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    tensors(folder, "optimizer.safetensors", x=torch.zeros(2))
    assert ids(folder) == expected


def refused(folder: Path, kind: type[DllmServeError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        LLM(str(folder), device="cpu")
    for part in parts:
        assert part in str(caught.value)


def only(*names: str, content: str | bytes = "x") -> Edit:
    """config.json, and other files in place of the weights."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            put(folder, name, content)

    return edit


def without_config(*names: str, content: str | bytes = "x") -> Edit:
    def edit(folder: Path) -> None:
        only(*names, content=content)(folder)
        (folder / "config.json").unlink()

    return edit


def adapter(folder: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    without_config("adapter_config.json", content=json.dumps(settings))(folder)
    tensors(folder, "adapter_model.safetensors", x=torch.zeros(2))


def adapter_with_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tensors(folder, "adapter_model.safetensors", x=torch.zeros(2))


def quantized(kind: torch.dtype, **settings: Any) -> Edit:
    def edit(folder: Path) -> None:
        given: Tensors = random_tensors(LLADA)
        name = next(n for n in given if "q_proj" in n)
        given[name] = given[name].to(kind)
        write(folder, config(LLADA) | settings, given)

    return edit


def halved(folder: Path) -> None:
    shutil.rmtree(folder)
    checkpoint(folder, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    put(folder, f".cache/huggingface/download/{shard.name}.abc.incomplete")


def pointers(folder: Path) -> None:
    put(folder, "model.safetensors", POINTER)


def links(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0123")


def linked_config(folder: Path) -> None:
    links(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/4567")


def hub_cache(folder: Path) -> None:
    inner = folder.with_name("inner")
    folder.rename(inner)
    (folder / "snapshots").mkdir(parents=True)
    inner.rename(folder / "snapshots" / "0123abcd")


KINDS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "LoRA": (adapter, ("PEFT adapter (LORA)", "'someone/base'", "merge_and_unload")),
    "LoRA and config": (adapter_with_config, ("PEFT adapter", "merge_and_unload")),
    "GGUF": (only("a-q4.gguf"), ("GGUF", "llama.cpp", "use the original checkpoint")),
    "GGUF alone": (without_config("a.gguf", "b.gguf"), ("GGUF", "a.gguf, b.gguf")),
    "ONNX": (only("onnx/model.onnx"), ("ONNX", "use the original checkpoint")),
    "MLX arrays": (only("weights.00.npz"), ("MLX", "use the original checkpoint")),
    "TensorFlow": (only("tf_model.h5"), ("TensorFlow",)),
    "Flax": (only("flax_model.msgpack"), ("Flax",)),
    "pickles": (only("pytorch_model.bin"), ("only .bin or .pt", "convert them to safetensors")),
    "pickles alone": (without_config("consolidated.00.pth"), ("no config.json", "pth", "convert")),
    "GPTQ": (
        quantized(torch.int32, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("is quantized (gptq, 4 bits", "is I32", "use the original checkpoint"),
    ),
    "AWQ": (
        quantized(torch.int32, quantization_config={"quant_method": "awq", "bits": 4}),
        ("is quantized (awq, 4 bits",),
    ),
    "bitsandbytes": (
        quantized(
            torch.uint8,
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        ("is quantized (bitsandbytes, 4 bits", "is U8"),
    ),
    "fp8": (
        quantized(torch.float8_e4m3fn, quantization_config={"quant_method": "fp8"}),
        ("is quantized (fp8", "q_proj.weight lacks", "weight_scale: expected its scales"),
    ),
    "compressed tensors": (
        quantized(torch.int8, quantization_config={"quant_method": "compressed-tensors"}),
        ("is quantized (compressed-tensors", "format is None, and none of float-quantized"),
    ),
    "MLX": (
        quantized(torch.uint32, quantization={"group_size": 64, "bits": 8}),
        ("is quantized (MLX, 8 bits",),
    ),
    "a download": (halved, ("model-00002-of-00002", "broken off", "run the download again")),
    "a download of one file": (
        only("model.safetensors.incomplete"),
        ("download that was broken off", "run the download again"),
    ),
    "git-lfs": (pointers, ("model.safetensors is a git-lfs pointer", "git lfs pull")),
    "git-lfs config": (
        lambda f: put(f, "config.json", POINTER),
        ("config.json is a git-lfs pointer", "git lfs pull"),
    ),
    "git-lfs index": (
        lambda f: ((f / "model.safetensors").unlink(), put(f, INDEX, POINTER)) and None,
        (f"{INDEX} is a git-lfs pointer",),
    ),
    "links": (links, ("links to files that are not there", "cp -rL")),
    "linked config": (linked_config, ("no config.json", "links to files that are not there")),
    "hub cache": (hub_cache, ("holds no model itself", "snapshots/0123abcd")),
    "empty": (without_config(), ("no config.json", "is empty")),
    "weights alone": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
}


def everywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """What LLM, ``info`` and ``generate`` say."""
    with pytest.raises(DllmServeError) as caught:
        LLM(str(folder), device="cpu")
    yield " ".join(str(caught.value).split())
    for arguments in (["info"], ["generate", "Hi"]):
        assert main([*arguments, "-m", str(folder), "--device", "cpu"]) == 1
        error = " ".join(capsys.readouterr().err.split())
        yield error.removeprefix("error: ")


@pytest.mark.parametrize("name", KINDS)
def test_other_directories_are_told_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    edit, parts = KINDS[name]
    folder = checkpoint(tmp_path / "model")
    edit(folder)
    said = list(everywhere(folder, capsys))
    assert len(set(said)) == 1, said
    for part in (*parts, str(folder)):
        assert part in said[0]


def test_the_server_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    from dllmserve import AsyncLLM

    folder = checkpoint(tmp_path / "model")
    adapter(folder)

    async def start() -> None:
        async with AsyncLLM(str(folder), device="cpu"):
            raise AssertionError("it started")

    with pytest.raises(ModelNotFoundError) as caught:
        asyncio.run(start())
    assert " ".join(str(caught.value).split()) == next(everywhere(folder, capsys))


def test_sizes_of_a_bare_config_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path)
    only("pytorch_model.bin")(folder)
    for arguments in (["--load-format", "dummy"], []):
        assert main(["info", "-m", str(folder), "--device", "cpu", *arguments]) == 0
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.gguf", "dllmserve convert model.gguf DIR"),
        ("model.onnx", "is an ONNX file"),
        ("pytorch_model.bin", "is a file of pickled weights"),
        ("model.safetensors", "is a file; give the directory that holds config.json"),
    ],
)
def test_a_file_in_place_of_a_directory(tmp_path: Path, name: str, part: str) -> None:
    put(tmp_path, name)
    refused(tmp_path / name, ModelNotFoundError, part, "the directory that holds config.json")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    refused(tmp_path / "model", ModelNotFoundError, "is a link to", "gone")


NEUTRAL: dict[str, Config] = {
    "no quantization": {"quantization_config": None},
    "empty quantization": {"quantization_config": {}},
    "quantization of loading": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "swish": {"hidden_act": "swish"},
    "no window": {"use_sliding_window": True, "sliding_window": None},
    "a window as long as all": {"use_sliding_window": True, "sliding_window": 256},
    "a window behind all layers": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "a window of no layer": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "full_attention"],
    },
    "rope null": {"rope_scaling": None, "rope_parameters": None},
    "rope empty": {"rope_scaling": {}},
    "rope default": {"rope_scaling": {"rope_type": "default"}},
    "rope default, older": {"rope_scaling": {"type": "default", "factor": 4.0}},
    "rope linear": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "rope dynamic": {"rope_scaling": {"type": "dynamic", "factor": 1}},
    "rope yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 1.0}},
    "rope llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0}},
    "rope parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "the whole head": {"partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_options_that_change_nothing(tmp_path: Path, name: str) -> None:
    expected = ids(checkpoint(tmp_path / "plain", shape=DREAM))
    assert ids(checkpoint(tmp_path / "model", shape=DREAM, **NEUTRAL[name])) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": -1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        {"layer_types": ["chunked_attention", "full_attention"]},
        {"rope_scaling": {"rope_type": "longrope", "factor": 1.0}},
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"partial_rotary_factor": 0.5},
        {"use_sliding_window": True, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"]},
    ],
)
def test_options_that_change_something(tmp_path: Path, change: Config) -> None:
    folder = checkpoint(tmp_path, shape=DREAM, **change)
    refused(folder, DllmServeError, next(iter(change)), "not supported")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"eos_token_id": "x"},
        {"eos_token_id": [[1]]},
        {"eos_token_id": 1.5},
    ],
)
def test_values_of_a_wrong_kind(tmp_path: Path, change: Config) -> None:
    folder = checkpoint(tmp_path, shape=DREAM, **change)
    refused(folder, DllmServeError, "wrong type")


def test_the_rotary_base_may_be_in_either_place() -> None:
    assert rope_theta({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}) == 7.0
    assert rope_theta({"rope_scaling": {"type": "default", "rope_theta": 8.0}}) == 8.0
    assert rope_theta({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}) == 5.0
    assert rope_theta({}) == 10000.0


def test_scaled_angles() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 7.0, "original_max_position_embeddings": 16}
    expected = RopeScaling(kind="yarn", factor=4.0, original_len=16, low=1.0, high=32.0)
    grown = 0.1 * math.log(4.0) + 1
    for given, factor in (({"factor": 4.0}, grown), ({"factor": None}, grown)):
        config = {"max_position_embeddings": 64, "rope_parameters": yarn | given}
        assert rope(config) == (7.0, replace(expected, attention_factor=factor))
    exact = {"factor": 4.0, "attention_factor": 1.0}
    assert rope({"rope_scaling": yarn | exact, "rope_theta": 9.0}) == (9.0, expected)
    beta = {"rope_type": "default", "llama_4_scaling_beta": 0.1}
    _, scaling = rope({"max_position_embeddings": 64, "rope_parameters": beta})
    assert scaling is not None and (scaling.query_beta, scaling.original_len) == (0.1, 64)
    with pytest.raises(UnsupportedModelError, match="'linear' is not supported"):
        rope_theta({"rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("name", ["NemotronLabsDiffusionModel", "MinistralDiffEncoderModel"])
def test_an_error_has_the_name_in_the_file(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"{name} lacks the field 'rope_parameters' \(.*rope_scaling"
    ):
        read_spec(
            {
                "architectures": [name],
                "vocab_size": 99,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            }
        )


def test_byte_order_marks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, shards=2)
    byte_tokenizer(folder, chat=True)
    put(folder, "generation_config.json", '{"eos_token_id": 7}')
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    llm = LLM(str(folder), device="cpu")
    assert llm.spec.eos_ids[:2] == (59, 7)
    assert llm.tokenizer is not None and llm.tokenizer.has_chat_template


def test_utf_16_says_so(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    path = folder / "config.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    refused(folder, DllmServeError, "config.json is not valid JSON", "UTF-16", "save it as UTF-8")
