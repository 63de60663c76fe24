"""DiffusionGemma's forward: upstream's logits, and the slow twin's on other shapes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dllmserve.models import loader
from dllmserve.models.decoder import CanvasTokens, Decoder
from dllmserve.parallel.group import SOLO, Group
from dllmserve.parallel.partition import Partition
from tests.helpers import GOLDEN, golden_raw, need_interpreter
from tests.oracles import diffusion_gemma as oracle

NAME = "diffusion-gemma-e6"
CPU = torch.device("cpu")


def load(folder: Path, kernels: str = "torch", group: Group = SOLO) -> Decoder:
    spec = loader.read_spec(loader.read_config(folder))
    options = {"dtype": torch.float32, "device": CPU, "max_len": 256, "kernels": kernels}
    return loader.load_decoder(folder, Partition(spec, group), **options)


def capped(decoder: Decoder, hidden: Tensor) -> Tensor:
    cap = decoder.spec.logit_cap
    return torch.tanh(hidden @ decoder.head.weight.T / cap) * cap


class Run:
    """A request: what is encoded stays, canvases are filled behind it."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.context, self.length = decoder, oracle.Attention(decoder.spec), 0

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
    for case in cases:
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
