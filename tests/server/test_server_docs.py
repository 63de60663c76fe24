"""The pages about the server are right: options, metrics, routes, and every curl in them."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import BaseRoute

from dllmserve.knobs import knobs
from dllmserve.process.messages import Counters
from dllmserve.process.supervisor import SupervisorOptions
from dllmserve.server import ops
from dllmserve.server.app import create_app
from dllmserve.server.config import ServerConfig
from dllmserve.server.http.slots import ConnectionStats
from dllmserve.server.metrics import EngineGauges, Gauges, Metrics
from dllmserve.server.settings import load_settings
from dllmserve.server.store.base import DROP_REASONS
from tests.test_docs import blocks

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
KEY = "0123456789abcdef"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def option_tables() -> str:
    """The option tables of docs/serving.md, as the dataclass would have them."""
    found: list[str] = []
    panel = ""
    for item in fields(ServerConfig):
        knob = knobs(ServerConfig)[item.name]
        if knob.panel != panel:
            panel = knob.panel
            found += ["", f"**{panel}**", "", "| option | default | meaning |", "|---|---|---|"]
        text = knob.help
        if knob.choices:
            text += f" One of {', '.join(knob.values())}."
        name = item.name.replace("_", "-")
        option = f"`--{name}`, `--no-{name}`" if item.default is True else f"`--{name}`"
        default = "none" if item.default in (None, "") else f"`{shown(item.default)}`"
        found.append(f"| {option} | {default} | {text} |")
    return "\n".join([*found, ""])


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_option_is_in_the_tables() -> None:
    text = page("serving.md")
    start, end = "<!-- options:start -->\n", "<!-- options:end -->"
    written = text.split(start, 1)[1].split(end, 1)[0]
    assert written == option_tables(), f"docs/serving.md should have:\n{option_tables()}"


def test_options_of_the_supervisor_are_documented() -> None:
    for item in fields(SupervisorOptions):
        if item.name != "command":  # for tests
            assert f"| `{item.name}` | `{item.default}` |" in page("api.md"), item.name


def everything_counted() -> bytes:
    """The page of /metrics after every kind of event."""
    metrics = Metrics("m", "vllm")
    metrics.accepted(3, 8)
    metrics.finished("stop", 4, 5, 1)
    metrics.failed("engine_died")
    metrics.aborted("disconnect")
    metrics.rejected("full")
    metrics.http("GET", "/live", 200, 0.1)
    for histogram in (
        metrics.first_text,
        metrics.between_tokens,
        metrics.total,
        metrics.queue,
        metrics.inference,
    ):
        histogram.observe(0.1)
    known = {f.name: 0 for f in fields(Gauges)}
    evicted = {str(reason): 1 for reason in DROP_REASONS}
    engines = [EngineGauges(up=True, running=1, work=1, restarts=1)]
    given = {**known, "engine": Counters(), "engines": engines, "evicted": evicted}
    given["connections"] = ConnectionStats(refused=Counter([503]))
    return metrics.render(Gauges(**given))


def test_every_metric_is_documented_as_it_is() -> None:
    """Names, types and labels; and no metric that there is not."""
    exported = {}
    for family in text_string_to_metric_families(everything_counted().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exported[name] = (family.type, ", ".join(f"`{label}`" for label in sorted(labels)))
    rows = re.findall(r"^\| `([a-z]+:[a-z0-9_]+)` \| (\w+) \| ([^|]*) \|", page("metrics.md"), re.M)
    assert {name: (kind, labels.strip()) for name, kind, labels in rows} == exported


def test_metrics_in_examples_exist() -> None:
    text = page("metrics.md")
    exported = everything_counted().decode()
    for name in re.findall(r"\b(?:dllmserve|vllm):[a-z0-9_]+", text):
        assert f"{name}{{" in exported or f"{name}_bucket{{" in exported, name


def test_reasons_that_are_counted_are_documented() -> None:
    text = page("metrics.md")
    for reason in DROP_REASONS:
        assert f"`{reason}`" in text, reason


def all_routes(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Method and path template of every route, those of included routers among them."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from all_routes(inner.routes)
        else:
            for method in getattr(route, "methods", None) or ():
                yield method, getattr(route, "path", "")


def documented_routes() -> dict[tuple[str, str], bool]:
    """Of the table in docs/security.md: whether a route needs a key."""
    table = page("security.md").split("## What the key protects", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(/[^`]*)` \| ([A-Z, ]+) \| (yes|no) \|", table, re.M)
    return {
        (method, path): needed == "yes"
        for path, methods, needed in rows
        for method in methods.split(", ")
    }


def test_the_key_protects_what_the_page_says() -> None:
    documented = documented_routes()
    app = create_app(load_settings({"job_store": "memory"}, {"DLLMSERVE_API_KEYS": KEY}))
    assert set(all_routes(app.routes)) == set(documented)
    assert {path for (_, path), needed in documented.items() if not needed} == ops.OPEN_PATHS
    served = app

    async def ask() -> None:
        transport = httpx.ASGITransport(served)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            for (method, template), needed in documented.items():
                path = template.replace("{model:path}", "tiny").replace("{name}", "x")
                path = path.replace("{request_id}", "0").replace("{response_id}", "x")
                answer = await client.request(method, path)
                assert (answer.status_code == 401) is needed, (method, template)
                known = await client.request(method, path, headers={"X-Api-Key": KEY})
                assert known.status_code != 401, (method, template)

    asyncio.run(ask())


def test_the_page_of_the_api_asks_no_other_host() -> None:
    app = create_app(load_settings({"job_store": "memory"}, {}))

    async def read() -> list[str]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            html = (await client.get("/docs")).text
            assets = re.findall(r'(?:src|href)="([^"]+)"', html)
            for asset in assets:
                if not asset.startswith("data:"):
                    answer = await client.get(asset)
                    assert answer.status_code == 200 and len(answer.content) > 1000, asset
            return assets

    assets = asyncio.run(read())
    assert len(assets) == 3
    assert all(asset.startswith(("/docs/", "data:")) for asset in assets)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """``dllmserve serve`` with the embedded model; gives its address once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "dllmserve", "serve", "--port", str(port)]
    command += ["--job-store", str(folder / "jobs.sqlite3"), "--device", "cpu"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DLLMSERVE_")}
    environ |= {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    break
            except OSError as error:
                text = (folder / "log").read_text()
                assert process.poll() is None and time.monotonic() < until, text
                del error
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, (folder / "log").read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("server")) as address:
        yield address


def shape(value: Any) -> Any:
    """Keys and types of JSON, for comparing what is printed with what is sent."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def commands(name: str) -> list[tuple[int, str, str | None]]:
    """Every curl of a page: line, command, and the JSON printed right after it, if it is."""
    found: list[tuple[int, str, str | None]] = []
    after_curl = False
    for info, line, code in blocks(DOCS / name):
        if info == "json" and after_curl:
            found[-1] = (*found[-1][:2], code)
        after_curl = info == "bash" and code.startswith("curl")
        if after_curl:
            found.append((line, code, None))
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="the documented commands need curl")
@pytest.mark.parametrize("name", ["quickstart.md", "serving.md", "http_api.md", "decisions.md"])
def test_every_curl_works_and_answers_as_printed(name: str, url: str) -> None:
    job = "0"
    assert commands(name)
    for line, command, printed in commands(name):
        command = command.replace("http://127.0.0.1:8000", url)
        command = command.replace("/v1/result/0", f"/v1/result/{job}")
        done = subprocess.run(
            ["bash", "-c", f"{command} --fail-with-body --max-time 60"],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, f"{name} line {line}: {done.stdout} {done.stderr}"
        if printed is not None:
            answer = json.loads(done.stdout)
            assert shape(answer) == shape(json.loads(printed)), f"{name} line {line}"
            job = str(answer.get("request_ids", [job])[0])


def test_examples_of_the_api_page_work(url: str) -> None:
    """What "Try it out" sends."""
    schema = httpx.get(f"{url}/openapi.json").json()
    sent = 0
    for path, operations in schema["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None:
            name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            (example,) = schema["components"]["schemas"][name]["examples"]
            answer = httpx.post(url + path, json=example, timeout=60)
            assert answer.status_code == 200, (path, answer.text)
            sent += 1
    assert sent == 12


@pytest.mark.parametrize("name", ["openai_client", "native_poll", "watch_stream"])
def test_examples_run_against_a_server(name: str, url: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "server" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "7 9 41" in done.stdout


def test_the_load_of_the_gateway_section(url: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "server" / "gateway_check.py"
    command = [sys.executable, str(script), url, "--requests", "4", "--clients", "4"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcomes"] == {"200": 2, "stream whole": 2}
