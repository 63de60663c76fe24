"""What is wrong with a quantized checkpoint is said before or while it is loaded, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllmserve import LLM
from dllmserve.cli.main import main
from dllmserve.errors import WeightsError
from dllmserve.models.schemes import NotReadError, read_scheme
from tests.checkpoints import Tensors
from tests.helpers import GOLDEN
from tests.quantized import formats, rewritten, write_both

#: of SDAR: [32, 48], that is three groups of 16 inputs
K = "model.layers.0.self_attn.k_proj"
Edit = Callable[[Tensors], object]


def said(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        LLM(str(folder), device="cpu")
    return str(caught.value)


def without(part: str) -> Edit:
    return lambda given: given.pop(f"{K}.{part}")


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda given: given.update({f"{K}.{part}": change(given[f"{K}.{part}"]).contiguous()})


def cut(part: str, rows: int, columns: int = 99) -> Edit:
    return changed(part, lambda t: t[:rows] if t.ndim == 1 else t[:rows, :columns])


def cast(part: str, dtype: torch.dtype) -> Edit:
    return changed(part, lambda t: t.to(dtype))


#: format, what is done to it, what is said
MISFITS: dict[str, tuple[str, Edit, str]] = {
    "no scale": (
        "fp8-channel",
        without("weight_scale"),
        f"{K}.weight lacks {K}.weight_scale: expected its scales",
    ),
    "no scale for a block": (
        "block-scales",
        without("weight_scale_inv"),
        f"{K}.weight lacks {K}.weight_scale: expected its scales",
    ),
    "a scale alone": (
        "fp8-channel",
        without("weight"),
        f"{K}.weight_scale lacks {K}.weight: expected the numbers that it scales",
    ),
    "a scale of floats": (
        "fp8-channel",
        cast("weight", torch.float32),
        f"{K}.weight is F32, expected F8_E4M3",
    ),
    "another float of eight bits": (
        "fp8-channel",
        cast("weight", torch.float8_e5m2),
        f"{K}.weight is F8_E5M2, expected F8_E4M3",
    ),
    "one dimension": (
        "fp8-channel",
        changed("weight", lambda t: t[0]),
        f"{K}.weight is (48,), expected two dimensions",
    ),
    "too few scales": (
        "fp8-channel",
        cut("weight_scale", 30),
        f"{K}.weight_scale is (30, 1), expected (32, 1) or (32,)",
    ),
    "scales of integers": (
        "fp8-channel",
        cast("weight_scale", torch.int64),
        f"{K}.weight_scale is I64, expected F32 or BF16 or F16",
    ),
    "too few blocks": (
        "fp8-block",
        cut("weight_scale", 1),
        f"{K}.weight_scale is (1, 2), expected (2, 2)",
    ),
    "other blocks": (
        "small-blocks",
        cut("weight_scale_inv", 2, 1),
        f"{K}.weight_scale_inv is (2, 1), expected (2, 2)",
    ),
    "no zero points": (
        "int8-zeros",
        without("weight_zero_point"),
        f"lacks {K}.weight_zero_point: expected its zero points",
    ),
    "other zero points": (
        "int8-zeros",
        cut("weight_zero_point", 3),
        f"{K}.weight_zero_point is (3, 1), expected (32, 1)",
    ),
    "zero points of floats": (
        "int8-zeros",
        cast("weight_zero_point", torch.float32),
        f"{K}.weight_zero_point is F32, expected I8",
    ),
    "no shape": (
        "int4-group",
        without("weight_shape"),
        f"lacks {K}.weight_shape: expected (32, inputs)",
    ),
    "another shape": (
        "int4-group",
        changed("weight_shape", lambda t: t + 1),
        f"{K}.weight_shape says (33, 49), expected (32, 'inputs')",
    ),
    "a shape of no inputs": (
        "int4-group",
        changed("weight_shape", lambda t: t * torch.tensor([1, -1])),
        f"{K}.weight_shape says (32, -48)",
    ),
    "a shape of three": (
        "int4-group",
        changed("weight_shape", lambda t: torch.tensor([32, 48, 1])),
        f"{K}.weight_shape is (3,), expected (2,)",
    ),
    "too few words": (
        "int4-group",
        cut("weight_packed", 32, 5),
        f"{K}.weight_packed is (32, 5), expected (32, 6)",
    ),
    "words of bytes": (
        "int4-group",
        cast("weight_packed", torch.uint8),
        f"{K}.weight_packed is U8, expected I32",
    ),
    "packed numbers alone": (
        "int4-group",
        without("weight_scale"),
        f"lacks {K}.weight_scale: expected its scales",
    ),
    "too few groups": (
        "int4-group",
        cut("weight_scale", 32, 2),
        f"{K}.weight_scale is (32, 2), expected (32, 3)",
    ),
    "no packed zero points": (
        "int4-group-zeros",
        without("weight_zero_point"),
        f"lacks {K}.weight_zero_point: expected its zero points",
    ),
    "other packed zero points": (
        "int4-group-zeros",
        cut("weight_zero_point", 3),
        f"{K}.weight_zero_point is (3, 3), expected (4, 3)",
    ),
    "zero points half packed": (
        "int4-group-zeros",
        cast("weight_zero_point", torch.int8),
        f"{K}.weight_zero_point is (4, 3), expected (32, 3)",
    ),
    "no order": (
        "int4-order",
        without("weight_g_idx"),
        f"lacks {K}.weight_g_idx: expected the groups of its 48 inputs",
    ),
    "an order of other inputs": (
        "int4-order",
        cut("weight_g_idx", 40),
        f"{K}.weight_g_idx is (40,), expected (48,)",
    ),
    "groups that are not there": (
        "int4-order",
        changed("weight_g_idx", lambda t: t + 1),
        f"{K}.weight_g_idx names groups 1 to 3, expected 0 to 2",
    ),
    "GPTQ without scales": ("gptq4", without("scales"), f"lacks {K}.scales: expected its scales"),
    "GPTQ without zero points": (
        "gptq4",
        without("qzeros"),
        f"lacks {K}.qzeros: expected its zero points",
    ),
    "GPTQ without numbers": (
        "gptq4",
        without("qweight"),
        f"lacks {K}.qweight: expected the numbers that it scales",
    ),
    "GPTQ with other numbers": (
        "gptq4",
        cast("qweight", torch.int64),
        f"{K}.qweight is I64, expected I32",
    ),
    "GPTQ with other zero points": (
        "gptq4",
        cut("qzeros", 3, 3),
        f"{K}.qzeros is (3, 3), expected (3, 4)",
    ),
    "GPTQ with other outputs": (
        "gptq4",
        cut("scales", 3, 30),
        f"{K}.scales is (3, 30), expected (3, 32)",
    ),
    "GPTQ with one scale": (
        "gptq4",
        changed("scales", lambda t: t[0, 0]),
        f"{K}.scales is (), expected (1, 32)",
    ),
    "GPTQ with other groups": (
        "gptq4",
        lambda given: (cut("scales", 2)(given), cut("qzeros", 2)(given)),
        f"{K}.scales is (2, 32), expected (3, 32)",
    ),
    "GPTQ without an order": (
        "gptq4-order",
        without("g_idx"),
        f"lacks {K}.g_idx: expected the groups of its 48 inputs",
    ),
    "GPTQ with an order of other inputs": (
        "gptq4-order",
        cut("g_idx", 40),
        f"{K}.g_idx is (40,), expected (48,)",
    ),
    "GPTQ with groups that are not there": (
        "gptq4-order",
        changed("g_idx", lambda t: t - 1),
        f"{K}.g_idx names groups -1 to 1, expected 0 to 2",
    ),
    "another shape than the model's": (
        "fp8-tensor",
        cut("weight", 16),
        f"misshapen: {K}.weight is (16, 48), expected (32, 48)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    form, edit, text = MISFITS[name]
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats(form))
    assert text in said(rewritten(folder, edit))


def test_info_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("int4-group"))
    expected = said(rewritten(folder, without("weight_scale")))
    assert str(folder) in expected and "is quantized (compressed-tensors)" in expected
    assert main(["info", "-m", str(folder), "--device", "cpu"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error == f"error: {' '.join(expected.split())}"


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    form = formats("int4-group")
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, form)
    group = json.loads(json.dumps(form.settings["config_groups"]["group_0"]))
    group["weights"]["group_size"] = 20
    rewritten(folder, lambda _: None, config_groups={"group_0": group})
    assert "for groups of 20, which do not divide the " in said(folder)


def test_a_part_in_two_files(tmp_path: Path) -> None:
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("fp8-channel"))
    file = rewritten(folder, lambda _: None) / "model.safetensors"
    scale = f"{K}.weight_scale"
    save_file({scale: load_file(file)[scale]}, folder / "more.safetensors")
    file.rename(folder / "most.safetensors")
    assert f"{scale} is in more than one file" in said(folder)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("gptq4"))
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b""):
        shard.write_bytes(content)
        assert f"{shard} cannot be read (truncated or corrupt?)" in said(folder)


def compressed(form: Any = "pack-quantized", group: Any = None, **weights: Any) -> dict[str, Any]:
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group if group is not None else {"weights": given}},
    }


TWO = {"a": {"weights": {"num_bits": 4, "symmetric": False}}, "b": {"weights": {"num_bits": 4}}}
OTHER_FORMAT = {**compressed()["config_groups"]["group_0"], "format": "int-quantized"}
#: settings, and why they are not read
NOT_READ: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq', and none of compressed-tensors"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
    ({"quant_method": ["gptq"]}, "quant_method is ['gptq'], and none of"),
    ({"group_size": 64, "bits": 4}, "quant_method is None, and none of"),
    (compressed("nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized', and none of"),
    (compressed("mixed-precision"), "format is 'mixed-precision', and none of"),
    (compressed(None), "format is None, and none of"),
    (compressed(["x"]), "format is ['x'], and none of"),
    (compressed() | {"config_groups": {}}, "config_groups is empty"),
    (compressed() | {"config_groups": None}, "config_groups is empty"),
    (compressed() | {"config_groups": ["Linear"]}, "config_groups is no object"),
    (compressed(group={"weights": None}), "config_groups.group_0 quantizes no weights"),
    (compressed(group=["Linear"]), "config_groups.group_0 quantizes no weights"),
    (
        compressed(group=OTHER_FORMAT),
        "group_0 has the format 'int-quantized', not 'pack-quantized'",
    ),
    (compressed(num_bits=3), "group_0 has weights of type 'int' with 3 bits"),
    (compressed(num_bits=4.0), "group_0 has weights of type 'int' with 4.0 bits"),
    (compressed(type="float"), "group_0 has weights of type 'float' with 4 bits"),
    (compressed("int-quantized"), "group_0 has weights of type 'int' with 4 bits"),
    (compressed("float-quantized", num_bits=8), "group_0 has weights of type 'int' with 8 bits"),
    (compressed(strategy="token"), "strategy is 'token', and none of tensor, channel"),
    (compressed(group_size=0), "group_size is 0, and not over 0"),
    (compressed(group_size="16"), "group_size is '16', and not over 0"),
    (compressed(group_size=None), "group_size is None, and not over 0"),
    (compressed(strategy="block"), "block_structure is None, and not two numbers"),
    (
        compressed(strategy="block", block_structure=[128]),
        "block_structure is [128], and not two numbers",
    ),
    (
        compressed(strategy="block", block_structure="ax128"),
        "block_structure is 'a', and not over 0",
    ),
    (compressed() | {"config_groups": TWO}, "some of its config_groups have zero points"),
    (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "weights are sparse"),
    (compressed() | {"sparsity_config": ["x"]}, "weights are sparse"),
    (compressed() | {"transform_config": {"config_groups": {"a": {}}}}, "weights are rotated"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2', and not 'e4m3'"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128, and not two"),
    ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "weight_block_size is -1"),
    ({"quant_method": "gptq", "bits": 3}, "bits is 3, and none of 4, 8"),
    ({"quant_method": "gptq", "bits": 2}, "bits is 2, and none of 4, 8"),
    ({"quant_method": "gptq"}, "bits is None, and none of 4, 8"),
    ({"quant_method": "gptq", "bits": [4]}, "bits is [4], and none of 4, 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0, and not over 0"),
    ({"quant_method": "gptq", "bits": 4, "group_size": [1]}, "group_size is [1], and not over 0"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:k": {"bits": 2}}}, "bits is 2, and none"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": ["+:k"]}, "dynamic is no object"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin', and none of"),
    ({"quant_method": "gptq", "bits": 4, "format": ["gptq"]}, "checkpoint_format is ['gptq']"),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "'marlin', and none of"),
    ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "pack_dtype is 'int8'"),
]


@pytest.mark.parametrize(("settings", "reason"), NOT_READ, ids=str)
def test_what_is_not_read_is_said_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotReadError) as caught:
        read_scheme({"quantization_config": settings})
    assert reason in str(caught.value)


def test_the_message_says_what_is_read(tmp_path: Path) -> None:
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("gptq4"))
    text = said(rewritten(folder, lambda _: None, bits=3))
    for part in (
        f"{folder} is quantized (gptq, 3 bits; ",
        "is I32), which is not read: bits is 3, and none of 4, 8. What is read: compressed-tensors",
        "else use the original checkpoint, with weights in F32, BF16 or F16",
    ):
        assert part in text


def test_another_dtype_beside_quantized_weights(tmp_path: Path) -> None:
    folder, _ = write_both(GOLDEN / "sdar-kv2of4", tmp_path, formats("fp8-channel"))
    name = "model.embed_tokens.weight"
    text = said(rewritten(folder, lambda given: given.update({name: given[name].to(torch.int8)})))
    assert f"{name} is I8), which is not read: in this format no tensor of that name has" in text


def test_settings_of_nothing_are_no_quantization(tmp_path: Path) -> None:
    """A program may have left them beside ordinary weights."""
    shutil.copytree(GOLDEN / "sdar-kv2of4", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for settings in (compressed(), compressed("nvfp4-pack-quantized"), {"quant_method": "fp8"}):
        file.write_text(json.dumps(config | {"quantization_config": settings}))
        LLM(str(tmp_path / "model"), device="cpu")
