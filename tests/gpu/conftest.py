"""Everything in this folder needs a CUDA device, and exact float32 products."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dllmserve import LLM
from tests.helpers import GOLDEN

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them without a device."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32: it rounds products to ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def golden_engines() -> dict[str, LLM]:
    """A float32 engine on the device for each golden checkpoint."""
    return {
        folder.name: LLM(
            str(folder), device="cuda", dtype="float32", kv_pages=400, gpu_memory_utilization=0.5
        )
        for folder in sorted(GOLDEN.iterdir())
        if folder.is_dir()
    }
