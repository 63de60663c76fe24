"""Load on a server with locust: chats, streamed chats, and jobs that are polled.

pip install locust
locust -f examples/server/locustfile.py --headless -u 50 -r 25 -t 15s --host http://127.0.0.1:8000
"""

import json
import os
import random
import time

from locust import HttpUser, between, task

#: a forward pass for four tokens: this measures the server, not the model's best answers
FAST = {"max_tokens": 16, "block_length": 16, "steps": 4}


def question() -> str:
    """A question whose answer is short."""
    return "Sort the numbers: " + " ".join(str(random.randrange(100)) for _ in range(3))


class Person(HttpUser):
    """Somebody who asks, reads, and asks again."""

    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        """Send the key of DLLMSERVE_API_KEY, if there is one."""
        if key := os.environ.get("DLLMSERVE_API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task(4)
    def chat(self) -> None:
        """Wait for a whole answer."""
        body = {"messages": [{"role": "user", "content": question()}], **FAST}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if answer.ok and not answer.json()["choices"][0]["message"]["content"]:
                answer.failure("an empty answer")

    @task(4)
    def stream(self) -> None:
        """Read an answer as it comes."""
        body = {"messages": [{"role": "user", "content": question()}], "stream": True, **FAST}
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            stream=True,
            catch_response=True,
            name="/v1/chat/completions (stream)",
        ) as answer:
            if not answer.ok:
                return
            lines = [line.decode() for line in answer.iter_lines() if line]
            if lines[-1:] != ["data: [DONE]"]:
                answer.failure("the stream has no end")
            elif any("error" in json.loads(line[6:]) for line in lines[:-1]):
                answer.failure("the stream has an error")

    @task(2)
    def job(self) -> None:
        """Submit a job and poll until it is finished."""
        body = {"prompt": question(), "gen_length": 16, "steps": 4}
        with self.client.post("/v1/generate", json=body, catch_response=True) as answer:
            if not answer.ok:
                return
            path = f"/v1/result/{answer.json()['request_ids'][0]}?wait=10"
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found = self.client.get(path, name="/v1/result").json()
            if found.get("status") != "running":
                break
