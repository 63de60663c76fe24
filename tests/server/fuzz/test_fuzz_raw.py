"""A short run of the raw fuzzer; "python -m tests.server.fuzz.raw" is the long one."""

import asyncio
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.clients.started import Started, started
from tests.server.fuzz.corpus import ANY, Case, corpus, request, valid
from tests.server.fuzz.raw import OPTIONS, Report, alive, answers, check_log, mutations, run

CASES = 500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, byte_checkpoint: Path) -> Iterator[Started]:
    """Impatient with whatever is incomplete."""
    with started(tmp_path_factory.mktemp("fuzzed"), str(byte_checkpoint), *OPTIONS) as running:
        yield running


def test_malformed_requests(server: Started) -> None:
    """4xx or a clean close, a log line for each answer, and a server that is still there."""
    report = asyncio.run(run(server.port, [*corpus(), *mutations(CASES, seed=0)]))
    check_log(server, report)
    assert report.wrong == []
    assert report.cases == len(corpus()) + CASES
    assert max(report.statuses) < 500
    assert statistics.median(report.seconds) < 0.1
    assert asyncio.run(alive(server.port))
    assert server.process.poll() is None


def test_what_is_mutated_was_right(server: Started) -> None:
    """The requests are accepted; jobs 0 and 1 need not be there."""
    cases = [Case("valid", data, ANY) for data in valid()]
    report = asyncio.run(run(server.port, cases))
    assert report.wrong == []
    assert set(report.statuses) <= {200, 204, 404, 410}
    assert report.statuses[200] >= len(cases) - 2


def test_the_fuzzer_notices(server: Started) -> None:
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert answers(ok + ok) == [200, 200]
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert answers(chunked + b"2\r\nok\r\n0\r\n\r\n" + ok) == [200, 200]
    wrong = b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n%b"
    for bad in (
        ok[:-1],
        b"ok",
        chunked + b"2\r\nok\r\n",
        wrong % (2, b"{}"),
        wrong % (20, b'{"error":{"type":1}}'),
    ):
        with pytest.raises((ValueError, KeyError)):
            answers(bad)
    report = asyncio.run(
        run(server.port, [Case("x", request("GET", "/nowhere"), frozenset({200}))])
    )
    assert len(report.wrong) == 1 and "x: 404" in report.wrong[0]
    other = Report(statuses=Counter({599: 1}))
    check_log(server, other)
    assert len(other.wrong) == 1
