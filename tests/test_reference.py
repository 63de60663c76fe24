"""The general slow decoder against upstream's outputs, where upstream has any."""

from functools import cache

import pytest

from tests import helpers
from tests.oracles import models
from tests.oracles.models import OracleModel
from tests.reference import decode


@cache
def model(name: str) -> OracleModel:
    return models.load(helpers.GOLDEN / name)


@pytest.mark.parametrize("name", helpers.MODELS)
def test_reference_is_upstream(name: str) -> None:
    for case in helpers.golden(name)[::2]:  # every kind of case is in this half
        assert decode(model(name), case.prompt, case.params, case.sparse).ids == case.output
