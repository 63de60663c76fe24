"""Submit and poll, with nothing but Python: jobs survive a restart of the server.

dllmserve serve
python examples/server/native_poll.py [URL] [KEY]
"""

import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
KEY = sys.argv[2] if len(sys.argv) > 2 else ""
PROMPTS = ["The people", "Fellow citizens"]
#: a prompt goes to the model as it is, so a chat needs what the model's chat template writes
CHAT = (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    "Sort the numbers: 9 41 7<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def call(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request; waits and tries again while the server is full, loading or away."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if KEY:
        headers["X-Api-Key"] = KEY
    for _ in range(60):
        request = urllib.request.Request(URL + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503):
                raise SystemExit(f"{error.code}: {error.read().decode()}") from error
            wait = int(error.headers.get("Retry-After", 1))
        except urllib.error.URLError:  # it is being restarted
            wait = 1
        time.sleep(wait)
    raise SystemExit(f"no answer from {URL}")


def result(job: int) -> dict[str, Any]:
    """Wait for the end of a job; each poll waits on the server's side."""
    while True:
        found = call(f"/v1/result/{job}?wait=20&details=true")
        if found["status"] != "running":
            return found


def main() -> None:
    """A batch, and one more job."""
    settings = {"temperature": 0, "gen_length": 16, "steps": 16}
    jobs = call("/v1/generate_batch", {"prompts": PROMPTS, **settings})["request_ids"]
    jobs += call("/v1/generate", {"prompt": CHAT, "block_length": 16, **settings})["request_ids"]
    for prompt, job in zip([*PROMPTS, CHAT], jobs, strict=True):
        found = result(job)
        print(f"{job}: {prompt!r} -> {found['status']}: {found.get('error') or found['text']!r}")


if __name__ == "__main__":
    main()
