"""/openapi.json says what is true, and errors say nothing of the inside."""

import json
import os
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from dllmserve.server.app import create_app
from dllmserve.server.native import GenerateRequest
from dllmserve.server.openai_bodies import ChatRequest, CompletionRequest
from dllmserve.server.settings import load_settings
from tests.server.clients.conftest import KEYS
from tests.server.clients.started import Started


def described(**environment: str) -> dict[str, Any]:
    settings = load_settings({"job_store": "memory"}, environment)
    found = create_app(settings).openapi()
    # as clients read it
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in it."""
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from parts(child)


def test_keys_are_asked_for_where_they_are_needed() -> None:
    probes = {"/health", "/v1/health", "/ready", "/live"}
    assert not any("security" in operation for _, operation in operations(described()))
    for more in ({}, {"DLLMSERVE_OPEN_METRICS": "true"}):
        secured = described(DLLMSERVE_API_KEYS=KEYS[0], **more)
        free = {path for path, operation in operations(secured) if "security" not in operation}
        assert free == probes | ({"/metrics"} if more else set())
        assert set(secured["components"]["securitySchemes"]) == {"bearer", "header"}


def test_statuses() -> None:
    for path, operation in operations(described()):
        statuses = set(operation["responses"])
        assert "422" not in statuses or path == "/v1/systemone"
        assert "200" in statuses | {"200" if "204" in statuses else ""}
        assert {"500", "503"} <= statuses or path in (
            "/metrics",
            "/v1/models",
            "/v1/models/{model}",
            "/version",
        )
        if "requestBody" in operation:
            assert {"400", "401", "408", "413", "415", "429", "503"} <= statuses


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, GenerateRequest])
def test_integers_are_taken_to_their_documented_bounds(kind: type[BaseModel]) -> None:
    """As the document's text says them: a float may stand for another integer."""
    fields = described()["components"]["schemas"][kind.__name__]["properties"]
    checked = 0
    for name, field in fields.items():
        for part in field.get("anyOf", ()):
            for bound, step in (("minimum", -1), ("maximum", 1)):
                if part.get("type") != "integer" or bound not in part:
                    continue
                edge = int(Decimal(json.dumps(part[bound])))
                assert not refused(kind, {name: edge}), (name, edge)
                assert refused(kind, {name: edge + step}), (name, edge)
                checked += 1
    assert checked >= 10


def refused(kind: type[BaseModel], fields: dict[str, Any]) -> bool:
    """Whether it is these fields that the body is refused for."""
    try:
        kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        return any(found["loc"][0] in fields for found in error.errors())
    return False


def test_texts_biases_and_events() -> None:
    schema = described()
    bodies = schema["components"]["schemas"]
    for name in ("CompletionRequest", "GenerateRequest"):
        text = bodies[name]["properties"]["prompt"]["anyOf"][0]
        assert text == {"type": "string", "minLength": 1}
        biases = bodies[name]["properties"]["logit_bias"]["anyOf"][0]
        assert biases["additionalProperties"] is False and len(biases["patternProperties"]) == 1
    streams = [
        response["content"]["text/event-stream"]
        for _, operation in operations(schema)
        for response in operation["responses"].values()
        if "text/event-stream" in response.get("content", {})
    ]
    assert len(streams) == 5
    assert all(stream["itemSchema"]["properties"]["data"] for stream in streams)


def test_links_lead_somewhere() -> None:
    schema = described()
    names = {operation["operationId"] for _, operation in operations(schema)}
    assert len(names) == len(list(operations(schema)))
    links = [part["links"] for part in parts(schema) if "links" in part]
    assert len(links) == 2
    assert {link["operationId"] for found in links for link in found.values()} <= names


@pytest.mark.parametrize(
    "path, methods",
    [
        ("/v1/result/0", {"GET", "DELETE"}),
        ("/v1/health", {"GET", "HEAD"}),
        ("/v1/generate", {"POST"}),
        ("/v1/models/tiny", {"GET"}),
        ("/docs", {"GET"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(
    server: Started, path: str, methods: set[str]
) -> None:
    answer = httpx.request("PATCH", f"{server.url}{path}")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == methods
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path, body, place",
    [
        ("/v1/completions", {"prompt": [["a"]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": [1]}, "stop.0"),
        ("/v1/completions", {"prompt": "a", "sparse": {"enabled": 4}}, "sparse.enabled"),
        ("/v1/completions", {"prompt": [2**31 - 1]}, "prompt[0]"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": 4}]},
            "messages.0.content",
        ),
        ("/v1/generate", {"prompt": 4}, "prompt"),
        ("/v1/generate_batch", {"prompts": [[-1]]}, "prompts.0"),
    ],
)
def test_errors_name_the_place_and_not_our_types(
    server: Started, path: str, body: dict[str, Any], place: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert place in error["message"]
    assert error["param"] == place.split(".")[0].split("[")[0]
    for inside in ("function-", "constrained", "list[", " at 0x", os.sep + "site-packages"):
        assert inside not in error["message"]
