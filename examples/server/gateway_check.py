"""Mixed requests against a gateway, and what became of them.

python examples/server/gateway_check.py http://127.0.0.1:8080 --requests 300 --clients 16

One in four is long, one in two a stream. A stream counts as whole when it ends with [DONE] and
holds no error. Prints one JSON line: statuses of plain requests, outcomes of streams, seconds.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any

import httpx

QUESTION = [{"role": "user", "content": "Sort the numbers: 9 41 7"}]


def body(number: int) -> dict[str, Any]:
    """The request of a number: its kind and length follow from it."""
    length = 64 if number % 4 == 0 else 16
    return {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": length,
        "block_length": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> str:
    """How a stream ended."""
    async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
        if answer.status_code != 200:
            return f"stream {answer.status_code}"
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    if any('"error"' in line for line in lines):
        return "stream with an error event"
    return "stream whole" if lines[-1:] == ["data: [DONE]"] else "stream cut"


async def ask(client: httpx.AsyncClient, number: int) -> str:
    """What became of one request."""
    request = body(number)
    try:
        if request["stream"]:
            return await stream(client, request)
        answer = await client.post("/v1/chat/completions", json=request)
        return str(answer.status_code)
    except httpx.HTTPError as error:
        return f"{'stream ' if request['stream'] else ''}{type(error).__name__}"


async def load(url: str, requests: int, clients: int) -> dict[str, Any]:
    """Send all requests from so many clients at once."""
    found: Counter[str] = Counter()
    numbers = iter(range(requests))
    began = time.monotonic()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as session:
            for number in numbers:
                found[await ask(session, number)] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"outcomes": dict(sorted(found.items())), "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(load(options.url, options.requests, options.clients))))


if __name__ == "__main__":
    main()
