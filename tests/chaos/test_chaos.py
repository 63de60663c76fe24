"""Faults against a real server, in a small size; `make chaos` runs them in full."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chaos.__main__ import main
from chaos.model import KINDS
from chaos.scenario import Ground, Report, Scenario
from chaos.scenarios import SCENARIOS

QUICK = [scenario for scenario in SCENARIOS if scenario.quick is not None]


#: of the other kinds of models; tests/server has their mixed load
GROWING = [("block-causal", "engine-kills"), ("autoregressive", "server-kill")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground.make(tmp_path_factory.mktemp("chaos"), KINDS["full"])


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_the_server_stands(ground: Ground, scenario: Scenario) -> None:
    report = asyncio.run(scenario.play(ground, quick=True))
    assert not report.wrong, f"{report.wrong}; measured: {report.measured}"


@pytest.mark.chaos
@pytest.mark.parametrize(("kind", "name"), GROWING)
def test_the_server_stands_with_requests_that_grow(tmp_path: Path, kind: str, name: str) -> None:
    (scenario,) = [one for one in SCENARIOS if one.name == name]
    test_the_server_stands(Ground.make(tmp_path, KINDS[kind]), scenario)


def test_what_a_scenario_raises_is_a_failure(ground: Ground) -> None:
    async def broken(ground: Ground, report: Report) -> None:
        report.measured["before"] = 1
        raise ValueError("out of luck")

    async def hangs(ground: Ground, report: Report) -> None:
        await asyncio.sleep(60)

    report = asyncio.run(Scenario("a", "", "", broken).play(ground, quick=False))
    assert report.wrong == ["ValueError: out of luck"]
    assert report.measured["before"] == 1
    report = asyncio.run(Scenario("b", "", "", hangs, limit_s=0.1).play(ground, quick=False))
    assert report.wrong == ["it was not through after 0.1 s"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["nonsense"])
    assert ended.value.code == 2
    assert "there is no scenario 'nonsense'" in capsys.readouterr().err


def test_names_are_unique() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)


def test_known_answers_cover_every_setting(ground: Ground) -> None:
    """Answers differ, stop strings stop, and a second look gives the same."""
    asks = ground.known.asks(15, (8, 24))
    texts = {ask.choices[0].text for ask in asks}
    assert len(texts) > 10
    (stopped,) = [ask for ask in asks if ask.name.startswith("stopped")]
    assert stopped.choices[0].reason == "stop"
    assert ground.known.answered(asks[2]).choices == asks[2].choices
