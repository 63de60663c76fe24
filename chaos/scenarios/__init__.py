"""All scenarios, in the order in which they are run."""

from __future__ import annotations

from chaos.scenario import Scenario
from chaos.scenarios.bad_start import BAD_START
from chaos.scenarios.descriptors import DESCRIPTORS
from chaos.scenarios.dropped import DROPPED
from chaos.scenarios.engine_kills import ENGINE_KILLS, RANK_KILLS
from chaos.scenarios.faults import FAULTS_INSIDE
from chaos.scenarios.isolation import ISOLATION
from chaos.scenarios.mixed import MIXED
from chaos.scenarios.overload import OVERLOAD
from chaos.scenarios.server_kill import SERVER_KILL
from chaos.scenarios.sigterm import SIGTERM
from chaos.scenarios.slow_clients import SLOW_CLIENTS
from chaos.scenarios.soak import SOAK

SCENARIOS: tuple[Scenario, ...] = (
    MIXED,
    ENGINE_KILLS,
    RANK_KILLS,
    SERVER_KILL,
    DROPPED,
    SLOW_CLIENTS,
    OVERLOAD,
    SIGTERM,
    FAULTS_INSIDE,
    ISOLATION,
    BAD_START,
    DESCRIPTORS,
    SOAK,
)
