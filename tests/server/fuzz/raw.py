"""Malformed requests against a server, byte by byte.

python -m tests.server.fuzz.raw --cases 5000
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import category

from tests.server.clients.started import Started, started
from tests.server.fuzz.corpus import ANY, Case, corpus, request, valid
from tests.server.fuzz.schema import byte_model

#: the server's patience with what is incomplete, in seconds, so that a run takes minutes
OPTIONS = ["--header-timeout", "0.5", "--body-timeout", "0.5", "--keep-alive-timeout", "0.2"]
OPTIONS += ["--default-max-tokens", "4", "--log-level", "debug"]
#: what no case may take
PATIENCE_S = 30.0
#: after which the line of an answered request is in the log
LOGGED_S = 2.0

_INTERESTING = (
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b"\xff",
    b"Content-Length: 7\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"GET /v1/health HTTP/1.1\r\n\r\n",
    b'"',
    b"{",
    b"]",
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"-1",
    b"9" * 40,
    b"null",
    b"true",
    b"%00",
    b"\x1b[2J",
)


@dataclass
class Report:
    """What came of a run.

    Attributes:
        cases: that were sent.
        statuses: of all answers.
        closed: cases whose connection was closed without an answer.
        seconds: to the first byte of the answer, without the cases that have to wait.
        wrong: what must not be, in words.
    """

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    closed: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def mutations(count: int, seed: int) -> Iterator[Case]:
    """Valid requests with a few bytes changed, always the same for a seed."""
    draw, good = random.Random(seed), valid()
    for number in range(count):
        data = draw.choice(good)
        head, blank, body = data.partition(b"\r\n\r\n")
        changes = draw.choice((1, 1, 1, 2, 3, 5))
        if body and draw.random() < 0.5:
            # a length that is right again leads further in
            for _ in range(changes):
                body = _mutated(body, draw, good)
            length = b"Content-Length: %d" % len(body)
            data = re.sub(rb"Content-Length: \d+", length, head) + blank + body
        else:
            for _ in range(changes):
                data = _mutated(data, draw, good)
        yield Case(f"mutation {number} of seed {seed}", data, ANY, slow=True)


def _mutated(data: bytes, draw: random.Random, good: list[bytes]) -> bytes:
    """One change."""
    at = draw.randrange(len(data) + 1)
    until = min(len(data), at + draw.choice((1, 1, 2, 8, 40)))
    kind = draw.randrange(8)
    if kind == 0:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.choice((1, 2, 16))) + data[at:]
    if kind == 2:
        return data[:at] + data[until:]
    if kind == 3:
        return data[:until] + data[at:until] * draw.choice((1, 3, 50)) + data[until:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        other = draw.choice(good)
        return data[:at] + other[draw.randrange(len(other)) :]
    if kind == 6 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    return data[:at] + draw.choice(_INTERESTING) + data[at:]


async def run(port: int, cases: Iterable[Case], parallel: int = 16) -> Report:
    """Send all cases, each on its own connection."""
    report, waiting = Report(), iter(list(cases))

    async def work() -> None:
        for case in waiting:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await _send(port, case, report)
            except TimeoutError:
                report.wrong.append(f"{case.name}: no end after {PATIENCE_S:g} s")

    await asyncio.gather(*(work() for _ in range(parallel)))
    return report


async def _send(port: int, case: Case, report: Report) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    start = time.monotonic()
    report.cases += 1
    data = b""
    try:
        writer.write(case.data)
        # a server that refuses need not read it all
        sending = asyncio.ensure_future(writer.drain())
        with contextlib.suppress(ConnectionError):
            data = await reader.read(1)
            first = time.monotonic() - start
            while more := await reader.read(1 << 20):
                data += more
        with contextlib.suppress(ConnectionError):
            await sending
        if data and not case.slow:
            report.seconds.append(first)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    try:
        statuses = answers(data, head=case.data.startswith(b"HEAD"))
    except (ValueError, KeyError, TypeError) as error:
        report.wrong.append(f"{case.name}: {error!r}: {data[:300]!r}")
        return
    report.statuses.update(statuses)
    report.closed += not statuses
    for status in statuses:
        if status not in case.statuses:
            report.wrong.append(f"{case.name}: {status}: {case.data[:300]!r}: {data[-300:]!r}")


def answers(data: bytes, *, head: bool = False) -> list[int]:
    """Statuses of the answers on a connection.

    Raises:
        ValueError: they are no complete HTTP, or an error is no error object.
    """
    statuses = []
    while data:
        top, blank, rest = data.partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", top)
        if not found or not blank:
            raise ValueError("not HTTP")
        status = int(found[1])
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in top.split(b"\r\n")[1:])
        }
        if status == 100:
            body, data = b"", rest
        elif headers.get(b"transfer-encoding") == b"chunked":
            body, data = _dechunked(rest)
        else:
            size = 0 if head or status == 204 else int(headers[b"content-length"])
            body, data = rest[:size], rest[size:]
            if len(body) != size:
                raise ValueError("an incomplete body")
        if status >= 400 and not head:
            error = json.loads(body)["error"]
            if set(error) != {"message", "type", "param", "code"} or not error["message"]:
                raise ValueError("no error object")
            if not all(c.isprintable() or category(c) == "Zs" for c in error["message"]):
                raise ValueError("a message that is not printable")
        statuses.append(status)
    return [status for status in statuses if status != 100]


def _dechunked(data: bytes) -> tuple[bytes, bytes]:
    """A chunked body, and what comes after it."""
    body = b""
    while True:
        size, found, data = data.partition(b"\r\n")
        length = int(size, 16)
        if not found or len(data) < length + 2:
            raise ValueError("an incomplete body")
        body, data = body + data[:length], data[length + 2 :]
        if not length:
            return body, data


def check_log(server: Started, report: Report) -> None:
    """Add to ``wrong`` what the log says: a line for each answer, and nothing forged."""
    until = time.monotonic() + LOGGED_S
    while (told := _logged(server)) != report.statuses and time.monotonic() < until:
        time.sleep(0.05)
    if told != report.statuses:
        report.wrong.append(f"the log has {told}, the clients got {report.statuses}")
    for line in server.lines():
        if line["level"] in ("ERROR", "CRITICAL"):
            report.wrong.append(f"in the log: {line}")
        if "request_id" in line and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", line["request_id"]):
            report.wrong.append(f"a forged request id: {line}")


def _logged(server: Started) -> Counter[int]:
    """Statuses in the log, without those of requests that nobody waited for."""
    lines = [line for line in server.lines() if line["logger"] == "dllmserve.access"]
    return Counter(line["status"] for line in lines if line["status"] != 499)


async def alive(port: int) -> bool:
    """Whether a plain request is answered."""
    report = Report()
    good = request("POST", "/v1/completions", b'{"prompt":"a","max_tokens":1}')
    await _send(port, Case("alive", good, frozenset({200})), report)
    return report.statuses == Counter({200: 1})


def main() -> None:
    """Start a server, send everything, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000, help="mutations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = byte_model(Path(folder) / "model")
        with started(Path(folder), str(model), *OPTIONS) as server:
            cases = [*corpus(), *mutations(arguments.cases, arguments.seed)]
            report = asyncio.run(run(server.port, cases))
            check_log(server, report)
            if not asyncio.run(alive(server.port)):
                report.wrong.append("the server does not answer any more")
    slices = statistics.quantiles([1000 * s for s in report.seconds], n=100)
    print(f"{report.cases} cases; statuses {dict(sorted(report.statuses.items()))}")
    print(f"{report.closed} closed without an answer")
    print(f"milliseconds to an answer: p50 {slices[49]:.1f}, p99 {slices[98]:.1f}")
    for text in report.wrong[:40]:
        print("WRONG", text)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
