"""The endpoint of CONTRIBUTING's recipe has, by one file and one line, all that others have."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.server.stand_in import KEYS, Server, make_server, run, secret, until
from tests.test_docs import ROOT, blocks

ASK = {"text": "ab", "gen_length": 4, "steps": 4}


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The module of the page."""
    page = ROOT / "CONTRIBUTING.md"
    found = [b for b in blocks(page) if b[0] == "python file=dllmserve/server/line.py"]
    ((_, _, code),) = found
    module = ModuleType("dllmserve.server.line")
    sys.modules[module.__name__] = module
    exec(code, module.__dict__)
    yield module
    del sys.modules[module.__name__]


def served(recipe: ModuleType, directory: Path, **options: Any) -> tuple[Any, Server]:
    app, server = make_server(directory, **options)
    app.include_router(recipe.router)
    return app, server


def test_it_answers_and_is_logged_and_counted(
    recipe: ModuleType, byte_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app, server = served(recipe, byte_checkpoint)
    caplog.set_level(logging.INFO, "dllmserve.access")

    async def main() -> None:
        async with app.router.lifespan_context(app):
            assert (await server.post("/v1/line", ASK)).json() == {"line": "abab"}
            assert (await server.post("/v1/line", {**ASK, "text": "a\n"})).json() == {"line": "a"}
        labels = {"method": "POST", "route": "/v1/line", "status": "200"}
        assert server.metric("http_requests_total", **labels) == 2
        assert server.idle()

    run(main())
    line = next(r for r in caplog.records if r.name == "dllmserve.access")
    assert (line.route, line.prompt_tokens, line.completion_tokens) == ("/v1/line", 2, 4)  # type: ignore[attr-defined]


def test_it_is_turned_away_without_room(recipe: ModuleType, byte_checkpoint: Path) -> None:
    """503 while the server is full, 429 for a key that has its share; no body is looked at."""
    options = {"max_requests": 4, "max_parallel_per_key": 1, "keys": KEYS}
    app, server = served(recipe, byte_checkpoint, **options)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            server.engine.hold = True
            begun = server.begin("POST", "/v1/line", ASK, **secret("ann"))
            await until(lambda: bool(server.engine.calls))
            refused = await server.post("/v1/line", b"{nonsense", **secret("ann"))
            assert (refused.status, refused.error["code"]) == (429, "too_many_parallel_requests")
            assert (await server.post("/v1/line", b"{nonsense", **secret("bob"))).status == 400
            assert (await server.post("/v1/line", ASK)).status == 401
            server.service.refuse_new()
            refused = await server.post("/v1/line", b"{nonsense", **secret("bob"))
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"]
            labels = {"method": "POST", "route": "/v1/line", "status": "503"}
            assert server.metric("http_requests_total", **labels) == 1
            server.engine.play(server.engine.calls[0])
            assert (await begun.reply()).status == 200

    run(main())


def test_a_client_that_leaves_ends_its_request(recipe: ModuleType, byte_checkpoint: Path) -> None:
    app, server = served(recipe, byte_checkpoint)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            server.engine.hold = True
            begun = server.begin("POST", "/v1/line", ASK)
            await until(lambda: bool(server.engine.calls))
            await begun.left()
            assert len(server.engine.aborted) == 1 and server.idle()

    run(main())


def test_its_errors_name_its_fields(recipe: ModuleType, byte_checkpoint: Path) -> None:
    app, server = served(recipe, byte_checkpoint)

    async def main() -> None:
        async with app.router.lifespan_context(app):
            for given, field in (
                ({"text": "x" * 5000}, "text"),  # refused by the service
                ({"text": "x" * 250, "gen_length": 32, "steps": 32}, "text"),  # by the engine
                ({"text": 7}, "text"),
                ({"text": "a", "texts": "b"}, "texts"),
                ({"text": "a", "gen_length": 0}, "gen_length"),
            ):
                answer = await server.post("/v1/line", given)
                assert (answer.status, answer.error["param"]) == (400, field), answer.body
            assert (await server.post("/v1/line", b'{"text": "a", "text": "b"}')).status == 400

    run(main())


def test_it_is_described(recipe: ModuleType, byte_checkpoint: Path) -> None:
    app, _ = served(recipe, byte_checkpoint, keys=KEYS)
    operation = app.openapi()["paths"]["/v1/line"]["post"]
    assert operation["security"] and {"200", "401", "429", "503", "504"} <= {
        *operation["responses"]
    }
