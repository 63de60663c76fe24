"""Matrices in e4m3, as plain torch computes them, against their definition; and who may not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllmserve import LLM, SamplingParams
from dllmserve.attention.backend import KVStore, unpadded_step
from dllmserve.catalog import BACKENDS
from dllmserve.config import EngineConfig
from dllmserve.core.plan import Span, StepEntry, StepPlan
from dllmserve.engine import machine, setup
from dllmserve.errors import ConfigError
from dllmserve.kernels.e4m3 import Scaled, scaled
from dllmserve.models import loader
from dllmserve.parallel.partition import Partition
from tests.helpers import GOLDEN, random_prompt
from tests.oracles import e4m3
from tests.parallel.threads import threaded_llm
from tests.quantized import by_library, fp8, write_both

CPU = torch.device("cpu")
#: full attention; biases; blocks; experts, a shared one among them; stacked ones and a canvas
MODELS = ("llada-kv2of4", "dream-kv2of4", "sdar-kv2of4", "llada2-g4e8", "diffusion-gemma-e6")


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that cannot are not refused: plain torch can, slowly."""
    monkeypatch.setattr(setup, "check_quantization", lambda *given: None)


def test_rounding_is_the_definitions() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.logspace(-6, 6, 200)[:, None]
    x[:, 0] = 0
    assert torch.equal(scaled(x.float()).wide().double(), e4m3.by_rows(x).float().double())
    steps = torch.arange(-448.0, 449.0, 0.125)
    assert torch.equal(steps.to(torch.float8_e4m3fn).double(), e4m3.rounded(steps.double()))
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scaled(weight).wide(), e4m3.by_rows(weight).float())


def hidden(folder: Path, decoder: Any) -> Tensor:
    """Of one sequence, after the final norm."""
    spec = decoder.spec
    kv = KVStore.create(
        spec, num_pages=0, page_size=1, num_rows=2, pages_per_row=1, dtype=torch.float32, device=CPU
    )
    tokens = torch.tensor(random_prompt(3, 20))
    plan = StepPlan((StepEntry(Span(0, 0, 20, 0, 0, 0, 0, 20), None, 0, "steps"),))
    context = BACKENDS["sdpa"].load()(spec).prepare(unpadded_step(plan, kv))
    found: Tensor = decoder(tokens, torch.arange(20), context)
    return found


@pytest.mark.parametrize("name", MODELS[:-1])
def test_products_are_the_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every matrix of every layer, and of nothing else: a router would choose others."""
    folder = GOLDEN / name
    spec = loader.read_spec(loader.read_config(folder))
    sizes: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "max_len": 64}
    narrow = loader.load_decoder(folder, Partition(spec), quantization="fp8", **sizes)
    plain = loader.load_decoder(folder, Partition(spec), **sizes)
    pairs = list(zip(narrow.weights, plain.weights, strict=True))
    matrices = [w.data for _, w in pairs if isinstance(w.data, Tensor) and w.data.dim() > 1]
    tables = (plain.embedding.weight, plain.head.weight)
    routers = [w.data for _, w in pairs if w.parts[0].name.endswith("gate.weight")]
    kept = sum(any(m is other for other in (*tables, *routers)) for m in matrices)
    assert sum(isinstance(w.data, Scaled) for w, _ in pairs) == len(matrices) - kept
    usual, seen = narrow.ops.scaled_linear, []

    def linear(x: Scaled, weight: Scaled, bias: Tensor | None) -> Tensor:
        found = usual(x, weight, bias)
        exact = e4m3.linear(x.wide(), weight.wide(), bias)
        seen.append(float((found - exact).norm() / exact.norm()))
        return found

    monkeypatch.setattr(narrow.ops, "scaled_linear", linear)
    found, expected = hidden(folder, narrow), hidden(folder, plain)
    assert max(seen) < 1e-5
    assert len(seen) >= 4 * spec.num_layers  # experts have more
    assert float((found - expected).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_requests_alone_and_together(anywhere: None, name: str) -> None:
    llm = LLM(str(GOLDEN / name), quantization="fp8", kv_pages=400)
    canvas = llm.spec.noise
    more = {"max_denoising_steps": 4} if canvas else {}
    params = [SamplingParams(gen_length=8 + 4 * (n % 2), seed=n, **more) for n in range(5)]
    prompts = [random_prompt(n, 3 + 2 * n) for n in range(5)]
    alone = [llm.generate([p], q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    assert llm.generate(prompts, params, use_tqdm=False) == alone


def test_ranks(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scales its own part of a row, so tokens may differ from those of one rank."""
    llm, _, _ = threaded_llm(
        monkeypatch,
        str(GOLDEN / "llada-kv4of4"),
        2,
        quantization="fp8",
        dtype="bfloat16",
        kv_pages=60,
    )
    params = SamplingParams(temperature=0.0, gen_length=16, steps=8)
    outputs = llm.generate([random_prompt(n, 5) for n in range(3)], params, use_tqdm=False)
    assert [len(o["token_ids"]) for o in outputs] == [16] * 3


def test_dummy_weights_are_the_same_numbers(anywhere: None) -> None:
    spec = loader.read_spec(loader.read_config(GOLDEN / "llada2-g4e8"))
    from dllmserve.models.random import random_decoder

    sizes: dict[str, Any] = {"dtype": torch.bfloat16, "device": CPU, "max_len": 64}
    plain = random_decoder(Partition(spec), **sizes)
    narrow = random_decoder(Partition(spec), quantization="fp8", **sizes)
    for one, other in zip(plain.weights, narrow.weights, strict=True):
        if isinstance(other.data, Scaled) and isinstance(one.data, Tensor):
            assert torch.equal(scaled(one.data).wide(), other.data.wide())
        else:
            assert torch.equal(one.data, other.data)  # type: ignore[arg-type]


CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FORMS = {
    "channel": by_library("float-quantized", **CHANNEL),
    "tensor": fp8(None, "weight_scale"),
    "block": fp8((16, 16), "weight_scale_inv"),
}


@pytest.mark.parametrize("name", FORMS)
def test_numbers_of_an_fp8_checkpoint_stay(tmp_path: Path, name: str) -> None:
    """Those that have one scale for each row; scales of blocks are joined to one of the row."""
    form, stays = FORMS[name], name != "block"
    folder, _ = write_both(GOLDEN / "llada-kv2of4", tmp_path, form)
    spec = loader.read_spec(loader.read_config(folder))
    sizes: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "max_len": 64}
    plain = loader.load_decoder(folder, Partition(spec), **sizes)
    narrow = loader.load_decoder(folder, Partition(spec), quantization="fp8", **sizes)
    for one, other in zip(plain.weights, narrow.weights, strict=True):
        if isinstance(other.data, Scaled) and isinstance(one.data, Tensor):
            expected = one.data if stays else scaled(one.data).wide()
            assert torch.equal(other.data.wide(), expected)
            assert stays or not torch.equal(expected, one.data)


def test_the_memory_plan_counts_bytes(anywhere: None) -> None:
    narrow = LLM("tiny", quantization="fp8", dtype="bfloat16", kv_pages=40)
    plain = LLM("tiny", dtype="bfloat16", kv_pages=40)
    numbers, rows = narrow.plan.sizing.in_e4m3
    assert numbers > 0.5 * narrow.spec.weights
    assert plain.plan.memory.weights - narrow.plan.memory.weights == numbers - 4 * rows


@pytest.mark.parametrize(
    ("dtype", "device", "kernels", "capability", "message"),
    [
        (torch.bfloat16, "cpu", "torch", None, "needs an NVIDIA GPU, and the device is cpu"),
        (torch.bfloat16, "cuda", "triton", (8, 0), "8.9 or more .* cuda has 8.0"),
        (torch.float32, "cuda", "triton", (9, 0), "runs in float32: give dtype='bfloat16'"),
        (torch.float16, "cuda", "triton", (9, 0), "runs in float16: give dtype='bfloat16'"),
        (torch.bfloat16, "cuda", "torch", (9, 0), "Triton kernels, and they are 'torch'"),
    ],
)
def test_refused(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    device: str,
    kernels: str,
    capability: tuple[int, int] | None,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=message):
        machine.check_quantization("fp8", dtype, torch.device(device), kernels)
    machine.check_quantization(None, dtype, torch.device(device), kernels)


def test_refused_at_the_door() -> None:
    with pytest.raises(ConfigError, match="quantization"):
        EngineConfig(quantization="fp4")
    with pytest.raises(ConfigError, match="or leave quantization out"):
        LLM("tiny", device="cpu", quantization="fp8")
