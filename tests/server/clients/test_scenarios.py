"""The official client plays its scenarios; `make clients` lets all the others play theirs."""

import pytest

from tests.clients.scenarios import Scenario, Target
from tests.clients.with_openai import SCENARIOS
from tests.server.clients.started import Started


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Scenario, server: Started) -> None:
    scenario(Target(server.url, "tiny"))
