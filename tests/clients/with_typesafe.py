"""TypeSafe's Python package, whose decisions have a form of their own."""

from typesafe_sdk import Choice, Noul, Score, TypeSafeBadRequestError, TypeSafeClient

from tests.clients.scenarios import KEY, QUESTION, Scenario, Target


def _client(target: Target) -> TypeSafeClient:
    return TypeSafeClient(api_key=KEY, base_url=target.url, model=target.model, timeout=60)


def system_one(target: Target) -> None:
    questions = {
        "three": Noul(instructions="There are three numbers."),
        "least": Choice(criteria={"9": None, "41": None, "7": "the last one"}),
        "hard": Score(criteria=["easy", "not so easy", "hard"]),
    }
    with _client(target) as client:
        found = client.system_one(state={"asked": QUESTION}, questions=questions)
    assert found.model == target.model and found.request_id
    assert 0 <= found.nouls["three"].noul <= 1 and found.choices["least"].choice in ("9", "41", "7")
    assert abs(sum(found.scores["hard"].probabilities.values()) - 1) < 1e-9


def large_state(target: Target) -> None:
    """Sent compressed."""
    with _client(target) as client:
        state = {"asked": [QUESTION] * 60}
        found = client.system_one(state=state, questions={"q": Noul(instructions="Is it long?")})
    assert found.usage.input_tokens and found.usage.input_tokens > 500


def models(target: Target) -> None:
    with _client(target) as client:
        assert [model.name for model in client.models.list().models] == [target.model]


def refusal(target: Target) -> None:
    with _client(target) as client:
        try:
            client.system_one(state="a", questions={"q": {"type": "box", "instructions": "a dog"}})
        except TypeSafeBadRequestError as error:
            assert "vision model" in str(error)
        else:
            raise AssertionError("a picture was found")


PACKAGE = "typesafe-sdk"
SCENARIOS: list[Scenario] = [system_one, large_state, models, refusal]
