"""Open files: as many as there may be connections, where the system allows it."""

import logging
import resource

import pytest

from dllmserve.server import serve
from dllmserve.server.config import ServerConfig

INFINITE = resource.RLIM_INFINITY
Pair = tuple[int, int]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """The process's limits of open files so far, oldest first; a test puts in the first."""
    found: list[Pair] = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: found.append(pair))
    return found


@pytest.mark.parametrize(
    ("before", "wanted", "after", "files"),
    [
        ((1024, 4096), 1152, (1152, 4096), 1152),
        ((1024, 4096), 500, (1024, 4096), 500),
        ((1024, INFINITE), 5000, (5000, INFINITE), 5000),
        ((INFINITE, INFINITE), 5000, (INFINITE, INFINITE), 5000),
        ((256, 1024), 1152, (1024, 1024), 1024),
        ((64, 64), 1152, (64, 64), 64),
    ],
)
def test_the_limit_is_raised(
    before: Pair, wanted: int, after: Pair, files: int, limits: list[Pair]
) -> None:
    limits.append(before)
    assert serve._allow_files(wanted) == files
    assert limits[-1] == after


@pytest.mark.parametrize(("connections", "reserve"), [(1, 32), (64, 32), (1024, 128), (8000, 1000)])
def test_an_eighth_is_kept_for_probes_and_keys(
    connections: int, reserve: int, limits: list[Pair]
) -> None:
    limits.append((1024, INFINITE))
    taken, _ = serve._connection_limits(
        ServerConfig(max_connections=connections, max_connections_per_address=7)
    )
    assert (taken.max_connections, taken.reserve) == (connections, reserve)
    assert taken.max_per_address == 7


@pytest.mark.parametrize(("hard", "enough"), [(20_000, True), (1024, False), (64, False)])
def test_fewer_files_are_fewer_connections(
    hard: int,
    enough: bool,
    limits: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits.append((min(hard, 1024), hard))
    monkeypatch.setattr(logging.getLogger("dllmserve"), "propagate", True)
    with caplog.at_level(logging.WARNING, "dllmserve.server"):
        taken, at_once = serve._connection_limits(ServerConfig())
    assert (taken.max_connections == 1024) is enough
    assert 1 <= taken.max_connections < hard and at_once >= 1 and taken.reserve >= 1
    most = taken.max_connections + taken.reserve + serve._GOES * at_once
    assert most + min(serve._OTHER_FILES, hard // 2) <= limits[-1][0] <= hard
    assert ("ulimit -n" in caplog.text) is not enough
