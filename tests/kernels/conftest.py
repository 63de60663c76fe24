"""Kernel tests run compiled where there is a CUDA device, else under Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch

#: where Triton cannot be installed there are no kernels to test
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
