"""A fake server, as good as new for each test, and the load generator against it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dllmserve.tools.bench.serve.arrivals import TraceEntry
from dllmserve.tools.bench.serve.figures import ServeResult, result_of
from dllmserve.tools.bench.serve.load import Measured, measure
from dllmserve.tools.bench.serve.options import ServeOptions
from dllmserve.tools.bench.serve.prompts import Source, builtin, traced
from tests.bench.serve.fake import Fake, running

Load = Callable[..., tuple[Measured, list[ServeResult]]]


@pytest.fixture(scope="package")
def server() -> Iterator[Fake]:
    with running() as found:
        yield found


@pytest.fixture
def fake(server: Fake) -> Fake:
    server.reset()
    return server


@pytest.fixture
def load(fake: Fake) -> Load:
    """Run a load test against the fake, without a warm-up unless asked for."""

    def call(
        trace: list[TraceEntry] | None = None, source: Source | None = None, **given: Any
    ) -> tuple[Measured, list[ServeResult]]:
        given = {"url": fake.url, "warmup": 0, "timeout": 20.0, **given}
        if trace is not None:
            given |= {"trace": "a file", "rates": ()}
        options = ServeOptions(**given)
        source = source or (builtin(options.seed) if trace is None else traced(trace))
        measured = asyncio.run(measure(options, source, trace))
        return measured, [result_of(row, options) for row in measured.rows]

    return call
