"""What has no room is refused before anything is done with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllmserve.server.turnstile import PATHS
from tests.server.stand_in import run, serving, until

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def test_every_path_that_takes_a_place_is_there(byte_checkpoint: Path) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint) as server:
            schema = (await server.get("/openapi.json")).json()
            posts = {path for path, methods in schema["paths"].items() if "post" in methods}
            assert posts == PATHS

    run(main())


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_full_server_reads_no_body(byte_checkpoint: Path, path: str) -> None:
    async def main() -> None:
        async with serving(byte_checkpoint, max_requests=1) as server:
            server.engine.hold = True
            first = server.begin("POST", "/v1/chat/completions", CHAT)
            await until(lambda: bool(server.engine.calls))
            # not even whether this is JSON is looked at
            refused = await server.post(path, b"{nonsense")
            assert refused.status == 503 and refused.headers["retry-after"]
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
