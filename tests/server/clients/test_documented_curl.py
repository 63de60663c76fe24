"""The documented native API, as its examples are: with curl where there is one."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients.started import Started, started

#: bodies of the documentation, byte for byte
ONE = """{
  "prompt": "Tell me about AI",
  "temperature": 0.6,
  "gen_length": 128
}"""
SEVERAL = """{
  "prompts": ["Prompt 1", "Prompt 2"],
  "temperature": 0.0,
  "gen_length": 64
}"""
CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, byte_checkpoint: Path) -> Iterator[Started]:
    """A server that has had no job yet."""
    with started(tmp_path_factory.mktemp("fresh"), str(byte_checkpoint)) as running:
        yield running


def ask(server: Started, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    if CURL is None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    command = [CURL, "-sS", "-X", method, f"{server.url}{path}", "-w", "\n%{http_code}"]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text)


def exactly(found: Any, expected: dict[str, Any]) -> None:
    """The same keys in the same order, the same values of the same types."""
    assert json.dumps(found) == json.dumps(expected)


def finished(server: Started, number: int) -> dict[str, Any]:
    """Poll as the documentation does."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        status, answer = ask(server, "GET", f"/v1/result/{number}")
        assert status == 200
        if answer["status"] != "running":
            assert isinstance(answer, dict)
            return answer
        exactly(answer, {"request_id": number, "status": "running", "text": None})
        time.sleep(0.05)
    raise AssertionError("the job did not end")


def test_the_documented_session(fresh: Started) -> None:
    assert ask(fresh, "GET", "/v1/health") == (200, {"status": "ok"})
    status, answer = ask(fresh, "POST", "/v1/generate", ONE)
    assert status == 200
    exactly(answer, {"request_ids": [0], "status": "submitted"})
    answer = finished(fresh, 0)
    assert isinstance(answer["text"], str) and answer["text"]
    exactly(answer, {"request_id": 0, "status": "finished", "text": answer["text"]})

    status, answer = ask(fresh, "POST", "/v1/generate_batch", SEVERAL)
    assert status == 200
    exactly(answer, {"request_ids": [1, 2], "status": "submitted"})
    for number in (1, 2):
        answer = finished(fresh, number)
        exactly(answer, {"request_id": number, "status": "finished", "text": answer["text"]})


def test_a_job_that_is_not_finished(fresh: Started) -> None:
    """More of them than are done when the first answer comes."""
    body = json.dumps({"prompts": ["a"] * 100, "gen_length": 200, "ignore_eos": True})
    status, answer = ask(fresh, "POST", "/v1/generate_batch", body)
    assert status == 200
    last = answer["request_ids"][-1]
    status, answer = ask(fresh, "GET", f"/v1/result/{last}")
    assert status == 200
    exactly(answer, {"request_id": last, "status": "running", "text": None})


def test_errors_say_it_twice(fresh: Started) -> None:
    """In OpenAI's shape, and in the one that clients of the native API know."""
    status, answer = ask(fresh, "GET", "/v1/result/123456")
    assert status == 404
    message = "there is no request 123456"
    error = {"message": message, "type": "not_found", "param": None, "code": "not_found"}
    exactly(answer, {"error": error, "detail": message})
    status, answer = ask(fresh, "POST", "/v1/generate", '{"prompt": "a", "gen_length": 10000}')
    assert status == 400
    assert answer["error"]["param"] == "gen_length"
    assert answer["detail"] == answer["error"]["message"]
