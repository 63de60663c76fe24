"""Servers that the tests of clients share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.clients.started import Started, started

#: keys of the guarded server; each test that uses one up has its own
KEYS = tuple(f"key-number-{i}-{'x' * 32}" for i in range(4))
REQUESTS_PER_MINUTE = 6


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """The embedded model, without keys."""
    with started(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def guarded_server(
    tmp_path_factory: pytest.TempPathFactory, byte_checkpoint: Path
) -> Iterator[Started]:
    """A small random model behind KEYS, that takes one request at a time."""
    folder = tmp_path_factory.mktemp("guarded")
    options = ["--max-requests", "1", "--requests-per-minute", str(REQUESTS_PER_MINUTE)]
    keys = ",".join(KEYS)
    with started(folder, str(byte_checkpoint), *options, DLLMSERVE_API_KEYS=keys) as running:
        yield running
