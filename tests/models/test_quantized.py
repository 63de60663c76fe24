"""Quantized checkpoints stand for what the library that writes them says, and answer so.

See :mod:`tests.quantized` for who wrote which.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllmserve import LLM, SamplingParams
from dllmserve.cli.main import main
from dllmserve.errors import WeightsError
from dllmserve.models import dequantized, loader
from dllmserve.models.decoder import Decoder
from dllmserve.models.dequantized import Dequantized
from dllmserve.models.files import weight_files
from dllmserve.models.quantized import tensors
from dllmserve.parallel.group import Group
from dllmserve.parallel.partition import Partition
from tests.helpers import GOLDEN, answer
from tests.parallel.threads import threaded_llm
from tests.quantized import (
    NAMES,
    Format,
    by_library,
    formats,
    is_quantized,
    rewritten,
    save_by_library,
    write_both,
)

PARAMS = SamplingParams(temperature=0.0, gen_length=8, ignore_eos=True)
PROMPT = [5, 9, 2, 17, 33, 4]
ATTENTION = "model.layers.0.self_attn"


def decoder(folder: Path, group: Group | None = None, *, exact: bool = True) -> Decoder:
    spec = loader.read_spec(loader.read_config(folder))
    partition = Partition(spec, group, exact) if group else Partition(spec)
    device = torch.device("cpu")
    return loader.load_decoder(folder, partition, dtype=torch.float32, device=device, max_len=64)


def held(folder: Path) -> Iterator[tuple[str, Dequantized]]:
    """The quantized matrices of a checkpoint."""
    config = loader.read_config(folder)
    for name, tensor in tensors(config, weight_files(folder)):
        if isinstance(tensor, Dequantized):
            yield name, tensor


@pytest.mark.parametrize("model", ["llada-kv2of4", "sdarmoe-kv2of4"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_library(tmp_path: Path, name: str, model: str) -> None:
    """In float32, to the last bit: all of them, and the parts of each of two ranks."""
    quantized, plain = write_both(GOLDEN / model, tmp_path, formats(name))
    for group, exact in (
        *((None, True), (Group(0, 2), True), (Group(1, 2), True)),
        *((Group(0, 2), False), (Group(1, 2), False)),
    ):
        mine, expected = (decoder(f, group, exact=exact) for f in (quantized, plain))
        for ours, theirs in zip(mine.weights, expected.weights, strict=True):
            assert torch.equal(ours.data, theirs.data), ours.parts


@pytest.mark.parametrize("name", NAMES)
def test_any_part_is_a_part_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also one that begins and ends inside of words, groups and blocks, some rows at a time."""
    monkeypatch.setattr(dequantized, "_CHUNK", 100)
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats(name))
    expected = load_file(plain / "model.safetensors")
    count = 0
    for matrix, tensor in held(quantized):
        rows, columns = tensor.get_shape()
        assert tensor.get_dtype() == "F32"
        for index in (
            (slice(None), slice(None)),
            (slice(3, 7), slice(5, columns - 9)),
            (slice(rows // 2, None), slice(13, 14)),
            (slice(rows - 1, rows), slice(None, 31)),
        ):
            assert torch.equal(tensor[index], expected[matrix][index])
        count += 1
    assert count == sum(is_quantized(n, t) for n, t in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_dequantised_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On one rank and on two, with full attention, blocks, and experts."""
    model = ("llada-kv2of4", "sdar-kv2of4", "sdarmoe-kv2of4")[NAMES.index(name) % 3]
    quantized, plain = write_both(GOLDEN / model, tmp_path, formats(name))
    expected = answer(LLM(str(plain), device="cpu"), PROMPT, PARAMS)
    assert answer(LLM(str(quantized), device="cpu"), PROMPT, PARAMS) == expected
    two, _, _ = threaded_llm(monkeypatch, str(quantized), 2)
    assert answer(two, PROMPT, PARAMS) == expected


def test_packed_queries_and_shared_experts(tmp_path: Path) -> None:
    quantized, plain = write_both(GOLDEN / "llada2-g4e8", tmp_path, formats("int4-channel"))
    for group in (None, Group(1, 2)):
        for ours, theirs in zip(
            decoder(quantized, group).weights, decoder(plain, group).weights, strict=True
        ):
            assert torch.equal(ours.data, theirs.data)


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_two_bytes(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    """The library multiplies in the dtype of the scales; that is ours, rounded once."""
    kind = form.split("-")[0]
    written = by_library(form, dtype, num_bits=8, type=kind, strategy="channel")
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, written)
    expected = load_file(plain / "model.safetensors")
    for name, tensor in held(quantized):
        assert torch.equal(tensor[:, :].to(dtype), expected[name])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("fp8-tensor", True),
        ("fp8-channel", True),
        ("fp8-static", True),
        ("small-blocks", False),
        ("int8-channel", False),
        ("int4-channel", False),
        ("gptq4", False),
    ],
)
def test_rows_in_fp8_can_be_had_as_they_are(tmp_path: Path, name: str, kept: bool) -> None:
    quantized, _ = write_both(GOLDEN / "llada-kv2of4", tmp_path, formats(name))
    for _, tensor in held(quantized):
        index = (slice(2, 9), slice(8, 24))
        parts = tensor.scaled(index)
        assert (parts is not None) == kept
        if parts is not None:
            data, scale = parts
            assert data.dtype == torch.float8_e4m3fn and data.shape == (7, 16)
            assert scale.dtype == torch.float32 and scale.shape == (7,)
            assert torch.equal(data.float() * scale[:, None], tensor[index])


def test_rows_with_zero_points_cannot(tmp_path: Path) -> None:
    quantized, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("fp8-channel"))
    group = dict(formats("fp8-channel").settings["config_groups"]["group_0"])
    group["weights"] = group["weights"] | {"symmetric": False}

    def edit(given: dict[str, Tensor]) -> None:
        for name in [n for n in given if n.endswith("weight_scale")]:
            zero = torch.ones(given[name].shape, dtype=torch.int8)
            given[name.replace("scale", "zero_point")] = zero

    whole = dict(held(rewritten(quantized, lambda _: None)))[f"{ATTENTION}.q_proj.weight"][:, :]
    rewritten(quantized, edit, config_groups={"group_0": group})
    moved = dict(held(quantized))[f"{ATTENTION}.q_proj.weight"]
    assert moved.scaled((slice(0, 2), slice(None))) is None
    assert not torch.equal(moved[:, :], whole)


def test_scales_of_activations_and_of_the_cache_are_not_needed(tmp_path: Path) -> None:
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("fp8-channel"))

    def edit(given: dict[str, Tensor]) -> None:
        given[f"{ATTENTION}.k_scale"] = torch.tensor([0.1])
        given[f"{ATTENTION}.v_proj.output_scale"] = torch.tensor([0.1])
        given[f"{ATTENTION}.q_proj.input_scale"] = torch.tensor([0.1])
        zeros = torch.zeros(64, 1).to(torch.float8_e4m3fn)  # of a symmetric format
        given[f"{ATTENTION}.q_proj.weight_zero_point"] = zeros

    rewritten(quantized, edit, kv_cache_scheme={"num_bits": 8, "type": "float"})
    for ours, theirs in zip(decoder(quantized).weights, decoder(plain).weights, strict=True):
        assert torch.equal(ours.data, theirs.data)


def test_biases_of_zeros_are_not_needed(tmp_path: Path) -> None:
    """AutoGPTQ has written some for models that have none; others would change results."""
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("gptq4"))
    rows = 64

    def edit(given: dict[str, Tensor]) -> None:
        given[f"{ATTENTION}.q_proj.bias"] = torch.zeros(rows, dtype=torch.float16)

    rewritten(quantized, edit)
    for ours, theirs in zip(decoder(quantized).weights, decoder(plain).weights, strict=True):
        assert torch.equal(ours.data, theirs.data)

    def change(given: dict[str, Tensor]) -> None:
        given[f"{ATTENTION}.q_proj.bias"][3] = 1.0

    rewritten(quantized, change)
    with pytest.raises(WeightsError, match=r"unexpected: model.layers.0.self_attn.q_proj.bias"):
        decoder(quantized)


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    """Older versions of compressed-tensors stored them so."""
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("int4-group-zeros"))

    def edit(given: dict[str, Tensor]) -> None:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        for name in [n for n in given if n.endswith("zero_point")]:
            shape = given[name.replace("zero_point", "scale")].shape
            given[name] = unpack_from_int32(given[name], 4, shape, packed_dim=0).contiguous()

    rewritten(quantized, edit)
    for ours, theirs in zip(decoder(quantized).weights, decoder(plain).weights, strict=True):
        assert torch.equal(ours.data, theirs.data)


@pytest.mark.parametrize(("name", "part"), [("gptq4", "g_idx"), ("int4-order", "weight_g_idx")])
def test_groups_that_follow_each_other_need_no_list(tmp_path: Path, name: str, part: str) -> None:
    """GPTQ may leave it out; compressed-tensors fills it with -1."""
    quantized, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats(name))

    def edit(given: dict[str, Tensor]) -> None:
        for key in [n for n in given if n.endswith("." + part)]:
            columns = len(given[key])
            given[key] = torch.arange(columns, dtype=torch.int32) // 16

    whole = [tensor.data.clone() for tensor in decoder(rewritten(quantized, edit)).weights]

    def clear(given: dict[str, Tensor]) -> None:
        for key in [n for n in given if n.endswith("." + part)]:
            given[key] = torch.full_like(given[key], -1)
            if name == "gptq4":
                del given[key]

    for ours, theirs in zip(decoder(rewritten(quantized, clear)).weights, whole, strict=True):
        assert torch.equal(ours.data, theirs)


def mixed_bits(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return formats("packed8-channel" if matrix.shape[0] > 48 else "int4-group").write(matrix)


def test_modules_may_differ_in_bits_and_groups(tmp_path: Path) -> None:
    one, other = (formats(n).settings for n in ("packed8-channel", "int4-group"))
    groups = {"a": one["config_groups"]["group_0"], "b": other["config_groups"]["group_0"]}
    form = Format(one | {"config_groups": groups}, mixed_bits)
    quantized, plain = write_both(GOLDEN / "sdar-kv2of4", tmp_path, form)
    for ours, theirs in zip(decoder(quantized).weights, decoder(plain).weights, strict=True):
        assert torch.equal(ours.data, theirs.data)


def test_info_and_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Memory is planned for what runs, and one line says what was done."""
    quantized, plain = write_both(GOLDEN / "llada-kv2of4", tmp_path, formats("gptq4"))
    said = []
    for folder in (quantized, plain):
        assert main(["info", "-m", str(folder), "--device", "cpu", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        said.append((facts["model"]["parameters"], facts["memory"]["weights_bytes"]))
    assert said[0] == said[1]
    with caplog.at_level(logging.INFO, "dllmserve.models"):
        decoder(quantized)
        decoder(plain)
    (line,) = [r.getMessage() for r in caplog.records if "dequantised" in r.getMessage()]
    assert line == (
        "the checkpoint is quantized (gptq, 4 bits): 22 matrices were dequantised as they were read"
    )


@pytest.mark.parametrize("form", ["naive-quantized", "pack-quantized", "float-quantized"])
def test_a_whole_model_that_the_library_saved(tmp_path: Path, form: str) -> None:
    """Its files are read, and give transformers' tokens where activations are not quantized."""
    model = save_by_library(GOLDEN / "qwen3-kv2of4", tmp_path, form)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["format"] == form
    expected, count = model.state_dict(), 0
    for name, tensor in held(tmp_path):
        assert torch.equal(tensor[:, :], expected[name])
        count += 1
    assert count == 7 * len(model.model.layers)
    if form != "float-quantized":
        ids = torch.tensor([PROMPT])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert (
            answer(LLM(str(tmp_path), device="cpu"), PROMPT, PARAMS)
            == out[0, len(PROMPT) :].tolist()
        )
