"""Parts of the load generator that need no server."""

from __future__ import annotations

import ast
import codecs
import math
import statistics
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllmserve.errors import ConfigError
from dllmserve.tools.bench.serve import arrivals
from dllmserve.tools.bench.serve.arrivals import arrival_times, read_trace
from dllmserve.tools.bench.serve.figures import Times, result_of, within_bounds
from dllmserve.tools.bench.serve.load import Row
from dllmserve.tools.bench.serve.options import (
    ServeOptions,
    base_url,
    parse_body,
    parse_headers,
)
from dllmserve.tools.bench.serve.outcome import Outcome, RequestFailed
from dllmserve.tools.bench.serve.prompts import builtin, listed
from dllmserve.tools.bench.serve.report import ServeReport
from dllmserve.tools.bench.serve.sse import SseParser
from dllmserve.tools.text import numbers

PACKAGE = Path(arrivals.__file__).parent


DOCUMENT = (
    b"\xef\xbb\xbf: a comment\ndata: first\n\n"
    b"event: x\r\nid: 7\r\ndata:no blank\r\ndata:  two blanks\r\n\r\n"
    b": keep-alive\r\rdata\r\rretry: 3\r\r"
    b'data: {"a": "\xc3\xa9\xe2\x80\xa8"}\n\ndata: [DONE]\n\ndata: never finished\n'
)
EVENTS = [b"first", b"no blank\n two blanks", b"", '{"a": "é\u2028"}'.encode(), b"[DONE]"]


@given(st.lists(st.integers(0, len(DOCUMENT)), max_size=12))
def test_events_do_not_depend_on_the_pieces(cuts: list[int]) -> None:
    parser = SseParser()
    places = [0, *sorted(cuts), len(DOCUMENT)]
    found = [e for a, b in pairwise(places) for e in parser.feed(DOCUMENT[a:b])]
    assert found == EVENTS


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_byte_by_byte(end: bytes) -> None:
    parser, text = SseParser(), b"data: a\ndata: b\n\ndata: c\n\n".replace(b"\n", end)
    found = [e for n in range(len(text)) for e in parser.feed(text[n : n + 1])]
    assert found == [b"a\nb", b"c"]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_shape(burstiness: float) -> None:
    times = list(islice(arrival_times(20.0, burstiness, 1), 20_000))
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    # coefficient of variation of a gamma distribution
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_poisson_process_has_no_memory() -> None:
    """As many gaps lie over their median in the second after a long gap as anywhere."""
    times = list(islice(arrival_times(10.0, 1.0, 2), 20_000))
    gaps = [b - a for a, b in pairwise(times)]
    over = statistics.fmean(gap > math.log(2) / 10 for gap in gaps)
    after_long = statistics.fmean(b > math.log(2) / 10 for a, b in pairwise(gaps) if a > 0.2)
    assert over == pytest.approx(0.5, abs=0.02) and after_long == pytest.approx(0.5, abs=0.04)


def test_arrivals_are_seeded_and_scale_with_the_rate() -> None:
    first = list(islice(arrival_times(1.0, 1.0, 3), 50))
    assert first == list(islice(arrival_times(1.0, 1.0, 3), 50))
    assert first != list(islice(arrival_times(1.0, 1.0, 4), 50))
    assert [at / 8 for at in first] == pytest.approx(list(islice(arrival_times(8.0, 1.0, 3), 50)))
    assert list(islice(arrival_times(math.inf, 1.0, 0), 3)) == [0.0] * 3


def test_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 2, "prompt": "b", "steps": 3}\n\n{"at": 0.5, "prompt": "a"}\n')
    found = read_trace(str(path))
    assert [(e.at, e.prompt, e.fields) for e in found] == [(0.5, "a", {}), (2.0, "b", {"steps": 3})]
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_trace(str(path)) == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":1 is not JSON"),
        ("[]", ":1 must be an object"),
        ('{"prompt": "a"}', '"at" must be a number of seconds >= 0, got None'),
        ('{"at": -1, "prompt": "a"}', "got -1"),
        ('{"at": true, "prompt": "a"}', "got True"),
        ('{"at": 1e999, "prompt": "a"}', ":1"),
        ('{"at": 1}', '"prompt" must be a text'),
        ('{"at": 1, "prompt": " "}', '"prompt" must be a text'),
        ('{"at": 1, "prompt": "\\ud800"}', ":1 is not JSON"),
        ('{"at": 1, "prompt": "a", "stream": false}', '"stream"'),
        ("", "holds no request"),
    ],
)
def test_bad_traces(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError) as caught:
        read_trace(str(path))
    assert message in str(caught.value)


def test_builtin_prompts() -> None:
    prompts = [builtin(0)(n)[0] for n in range(300)]
    assert prompts == [builtin(0)(n)[0] for n in range(300)]
    assert prompts != [builtin(1)(n)[0] for n in range(300)]
    words = [len(prompt.split()) for prompt in prompts]
    assert min(words) < 10 and max(words) > 200 and max(words) < 400
    assert len(set(prompts)) > 100
    assert builtin(0)(-1)[0]
    assert [listed(["a", "b"])(n)[0] for n in (0, 1, 2, -1)] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://h/v1", "http://h"),
        ("https://h/team/v1/", "https://h/team"),
        ("http://[::1]:5/x", "http://[::1]:5/x"),
    ],
)
def test_base_url(url: str, expected: str) -> None:
    assert base_url(url) == expected


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"url": "127.0.0.1:8000"}, "url must look like http://127.0.0.1:8000"),
    ({"url": "ftp://h"}, "url must look like"),
    ({"url": "http://h:99999"}, "url: Port out of range"),
    ({"url": "http://h:x"}, "url: Port could not be cast"),
    ({"url": "http://h/a b"}, "without blanks"),
    ({"url": "http://é"}, "plain ASCII"),
    ({"url": "http://h?a=b"}, "must end before any ?"),
    ({"url": "http://me:geheim@h"}, "must hold no user or password"),
    ({"endpoint": "embeddings"}, "endpoint must be one of 'chat', 'completions', 'native'"),
    ({"endpoint": "native"}, "submit and poll, use --no-stream"),
    ({"stream": False, "slo_first": 1.0}, "slo_first needs a stream"),
    ({"slo_total": 0.0}, "slo_total must be a finite number > 0, got 0"),
    ({"body": {"stream": True}}, "use --stream or --no-stream"),
    ({"rates": (1.0,), "trace": "x"}, "rate and trace exclude each other"),
    ({"rates": (), "trace": "x", "prompts": "y"}, "prompts and trace exclude each other"),
    ({"rates": (math.inf,), "duration": 5.0}, "duration has no meaning"),
    ({"rates": (1e6,), "duration": 60.0}, "over the 1,000,000 requests"),
    ({"requests": 0}, "requests must be an integer in [1, 1000000], got 0"),
    ({"concurrency": 0}, "concurrency must be an integer >= 1, got 0"),
    ({"burstiness": 0.0}, "burstiness must be a finite number > 0"),
    ({"timeout": math.inf}, "timeout must be a finite number > 0"),
    ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
    ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
    ({"warmup": -1}, "warmup must be"),
    ({"seed": -1}, "seed must be"),
    ({"api_key": "geheim\n"}, "api_key must be printable ASCII"),
]


@pytest.mark.parametrize(("given_", "text"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(given_: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeOptions(**given_)
    assert text in str(caught.value) and "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "x", "nan", "1;2", "1 2"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ConfigError, match="rate must be numbers > 0 or inf"):
        numbers("rate", text, float, "numbers > 0 or inf")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": NaN}', '"a"'])
def test_bad_bodies(text: str) -> None:
    with pytest.raises(ConfigError, match="body "):
        parse_body(text)


@pytest.mark.parametrize(
    "text", ["geheim", "a b: geheim", ": geheim", "x: geheim\r\ny: 1", "Content-Length: geheim"]
)
def test_bad_headers(text: str) -> None:
    with pytest.raises(ConfigError, match="header") as caught:
        parse_headers([text])
    assert "geheim" not in str(caught.value)


def test_default_lengths() -> None:
    options = ServeOptions()
    assert options.limits(2.0) == (1_000_000, 30.0)
    assert options.limits(math.inf)[0] == 100
    assert ServeOptions(requests=7).limits(2.0) == (7, math.inf)
    assert ServeOptions(rates=(), trace="x").limits(math.nan) == (1_000_000, math.inf)


def test_secrets_stay_secret() -> None:
    options = ServeOptions(api_key="geheim", headers={"x-team": "geheim"})
    assert "geheim" not in repr(options) + repr(options.public())
    assert options.public()["headers"] == ["x-team"] and options.public()["api_key"] is True


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_percentiles(values: list[float]) -> None:
    """The same percentiles as everywhere else."""
    found = Times.of([None, *values])
    assert found is not None and (found.count, found.max) == (len(values), max(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert value == pytest.approx(np.percentile(values, percent))


def answered(index: int, total: float, **more: Any) -> Outcome:
    at = 100.0 + index
    return Outcome(index, at, at, at, at + total / 2, at + total, kind="ok", **more)


def test_figures_by_hand() -> None:
    failed = Outcome(3, 103.0, 103.5, 103.5, finished=104.0)
    failed.fail(RequestFailed("http 500", "oops", 500))
    rejected = Outcome(4, 104.0, 104.0, 104.0, finished=104.0)
    rejected.fail(RequestFailed("rejected", "full", 503, retry_after=True))
    outcomes = [
        answered(0, 1.0, output_tokens=10, forward_passes=5),
        answered(1, 2.0, output_tokens=30, forward_passes=5),
        answered(2, 3.0),
        failed,
        rejected,
        Outcome(5, 105.0, 105.0),
    ]
    row = Row(1.0, start=100.0, outcomes=outcomes, seconds=8.0, cpu_seconds=0.8, interrupted=True)
    options = ServeOptions(slo_total=2.0, slo_first=0.9, concurrency=4)
    found = result_of(row, options)
    assert (found.requests, found.ok, found.rejected) == (6, 3, 1)
    assert (found.failed, found.unfinished) == (1, 1)
    assert (found.failures, found.rejections) == ({"http 500": 1}, {"503": 1})
    assert found.messages == {"http 500": "oops", "rejected": "full"}
    assert (found.retry_after, found.without_usage) == (1, 1)
    assert (found.requests_per_second, found.tokens_per_second) == (3 / 8, 5.0)
    assert (found.output_tokens, found.tokens_per_forward) == (40, 4.0)
    assert found.total == Times(3, 2.0, 2.0, pytest.approx(2.8), pytest.approx(2.98), 3.0)
    assert found.first_text is not None and found.first_text.p50 == 1.0
    assert [within_bounds(o, options) for o in outcomes] == [True, *[False] * 5]
    assert found.good is not None and found.good.requests == 1
    assert (found.good.share, found.good.per_second) == (1 / 5, 1 / 8)
    client = found.client
    assert (client.max_send_delay, client.max_slot_wait) == (0.5, 0.0)
    assert client.cpu_share == pytest.approx(0.1)
    assert found.late and found.arrived_per_second == 6 / 5
    notes = ServeReport(options, "m", None, [found], interrupted=True).notes()
    for part in (
        "interrupted: the last row is cut short, 1 unfinished",
        "rate 1: 1 rejected (1 with 503, 1 said when to come back)",
        "rate 1: 1 failed, http 500, the first: oops",
        "rate 1: 1 of 3 answers came without usage",
        "rate 1: the client could not keep up: up to 0.500 s late, 10% of a core",
        "concurrency=4 makes this a partly closed loop",
    ):
        assert any(note.startswith(part) for note in notes), part


def test_a_row_without_an_answer() -> None:
    found = result_of(Row(2.0), ServeOptions(slo_total=1.0))
    assert (found.requests, found.total, found.tokens_per_second) == (0, None, None)
    assert found.good is not None and found.good.share == 0.0
    report = ServeReport(ServeOptions(), None, None, [found])
    assert report.record()["results"][0]["requests"] == 0 and report.table()


def test_record_of_an_outcome() -> None:
    found = answered(1, 2.0, output_tokens=3).record(100.0)
    assert (found["scheduled"], found["first_text"], found["finished"]) == (1.0, 2.0, 3.0)
    assert (found["kind"], found["output_tokens"], found["queue_seconds"]) == ("ok", 3, None)


def test_no_torch() -> None:
    modules = [f"dllmserve.tools.bench.serve.{path.stem}" for path in PACKAGE.glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert len(modules) >= 10


def test_random_is_always_seeded() -> None:
    """The module's own generator would make runs differ."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "random" or node.attr == "Random", path
