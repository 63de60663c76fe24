"""What has no room is refused before anything is done with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.stand_in import make_server, run, serving, until

PATHS = (
    "/v1/generate",
    "/v1/generate_batch",
    "/v1/generate/stream",
    "/v1/infill",
    "/infill",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/decisions",
    "/v1/systemone",
)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def test_an_endpoint_that_is_added_is_covered(byte_checkpoint: Path) -> None:
    """Nobody has to think of it: what is sent by POST asks for something of the engine."""
    app, server = make_server(byte_checkpoint)
    seen: list[str] = []

    @app.post("/v1/more/{name}")
    async def more(name: str) -> str:
        seen.append(name)
        return name

    @app.put("/v1/more/{name}")
    async def other(name: str) -> str:
        return name

    paths = {p for p, methods in app.openapi()["paths"].items() if "post" in methods}
    assert paths == {*PATHS, "/v1/more/{name}"}

    async def main() -> None:
        async with app.router.lifespan_context(app):
            assert (await server.post("/v1/more/a", None)).json() == "a"
            server.service.refuse_new()
            assert (await server.post("/v1/more/b", None)).status == 503
            labels = {"method": "POST", "route": "/v1/more/{name}", "status": "503"}
            assert server.metric("http_requests_total", **labels) == 1
            assert (await server.ask("PUT", "/v1/more/c")).json() == "c"
            assert (await server.post("/v1/none", None)).status == 404
            assert seen == ["a"]

    run(main())


@pytest.mark.parametrize("path", PATHS)
def test_a_full_server_reads_no_body(byte_checkpoint: Path, path: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_requests=1) as server:
            server.engine.hold = True
            first = server.begin("POST", "/v1/chat/completions", CHAT)
            await until(lambda: bool(server.engine.calls))
            # not even whether this is JSON is looked at
            refused = await server.post(path, b"{nonsense")
            assert refused.status == 503 and refused.headers["retry-after"]
            if path == "/v1/systemone":
                assert refused.json()["detail"]["error_type"] == "overloaded"
            else:
                assert refused.error["code"] == "overloaded"
                assert ("detail" in refused.json()) == path.startswith("/v1/generate")
            assert server.metric("admission_rejections_total", reason="full") == 1
            # in the metrics it is under its own route
            labels = {"method": "POST", "route": path, "status": "503"}
            assert server.metric("http_requests_total", **labels) == 1
            # nothing else is refused
            assert (await server.get("/health")).status == 200
            assert (await server.get("/v1/result/7")).status == 404
            server.engine.play(server.engine.calls[0])
            assert (await first.reply()).status == 200
            assert (await server.post(path, b"{nonsense")).status == 400

    run(main())
