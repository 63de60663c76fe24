"""Every OpenAI parameter: honoured, or accepted only where it changes nothing.

What cannot be honoured is refused by name; nothing is dropped silently.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from tests.server.clients.started import Started

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BOTH = (CHAT, TEXT)
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2, "steps": 1},
    TEXT: {"prompt": "Hi.", "max_tokens": 2, "steps": 1},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

#: paths, parameter, values that change nothing, values that would change something
TABLE: list[tuple[tuple[str, ...], str, list[Any], list[Any]]] = [
    (BOTH, "frequency_penalty", [0, 0.0, None], [0.1, -2, 1e-9, "0", False]),
    (BOTH, "presence_penalty", [0, 0.0, None], [0.1, -2, 1e-9, "0", False]),
    (BOTH, "repetition_penalty", [1, 1.0, None], [1.1, 0, True]),
    (BOTH, "min_p", [0, 0.0, None], [0.1]),
    (BOTH, "min_tokens", [0, None], [1]),
    ((TEXT,), "suffix", ["", "end", None], [5]),
    ((TEXT,), "best_of", [1, None], [0, 2, "1"]),
    ((TEXT,), "logprobs", [None], [-1, 21, True]),
    ((CHAT,), "logprobs", [False, None], [0, 1]),
    ((CHAT,), "top_logprobs", [0, None], [1, 21, False]),  # without logprobs
    ((CHAT,), "response_format", [{"type": "text"}, None], [{"type": "xml"}, {}, "text"]),
    ((CHAT,), "tools", [[], None], [[{**TOOL, "type": "custom"}], {}]),
    ((CHAT,), "tool_choice", ["none", "auto", None], ["required", TOOL]),
    ((CHAT,), "prompt_cache_options", [None], [{"mode": "implicit"}]),
    ((CHAT,), "chat_template_kwargs", [{}, {"enable_thinking": False}, None], [{"tools": 1}, []]),
    ((CHAT,), "functions", [[], None], [[TOOL], {}]),
    ((CHAT,), "function_call", ["none", "auto", None], [{"name": "f"}]),
    ((CHAT,), "modalities", [["text"], None], [["text", "audio"], ["audio"], []]),
    ((CHAT,), "audio", [None], [{"voice": "alloy", "format": "wav"}]),
    ((CHAT,), "prediction", [None], [{"type": "content", "content": "Hi."}]),
    ((CHAT,), "moderation", [None], [{"model": "m"}]),
    ((CHAT,), "web_search_options", [None], [{}]),
]
#: of no meaning here: any value of their type
NOT_READ: list[tuple[tuple[str, ...], str, list[Any], list[Any]]] = [
    (BOTH, "user", ["somebody", "", None], [5, {}]),
    (BOTH, "store", [True, False, None], [0, "yes"]),
    (BOTH, "metadata", [{"a": "b"}, {}, None], [{"a": 1}, "a"]),
    (BOTH, "service_tier", ["auto", "flex", "priority", None], [1]),
    (BOTH, "safety_identifier", ["somebody", None], [5]),
    (BOTH, "prompt_cache_key", ["somebody", None], [5]),
    (BOTH, "prompt_cache_retention", ["in_memory", "24h", None], [24]),
    ((CHAT,), "reasoning_effort", ["none", "low", "high", "xhigh", None], [3, ["low"]]),
    ((CHAT,), "verbosity", ["low", "medium", "high", None], [False]),
    ((CHAT,), "parallel_tool_calls", [True, False, None], [1, "yes"]),
]
TABLE += NOT_READ
#: honoured, with a value that is and one that cannot be
HONOURED: list[tuple[tuple[str, ...], str, Any, Any]] = [
    (BOTH, "model", "tiny", 7),
    (BOTH, "max_tokens", 2, 0),
    ((CHAT,), "max_completion_tokens", 2, 2.5),
    (BOTH, "temperature", 0.5, -0.1),
    (BOTH, "top_p", 0.5, 1.1),
    (BOTH, "top_k", 5, -2),
    (BOTH, "top_k", -1, 0.5),
    (BOTH, "seed", -3, 0.5),
    (BOTH, "stop", [f"{i}x" for i in range(16)], [f"{i}x" for i in range(17)]),
    (BOTH, "stop", [], ["x" * 257]),
    (BOTH, "n", 2, 0),
    (BOTH, "stream", False, "yes"),
    (BOTH, "stream_options", None, {"include_usage": True}),  # without stream
    (BOTH, "logit_bias", {"5": -100}, {"five": 1}),
    ((TEXT,), "echo", True, "yes"),
    (BOTH, "steps", 2, 0),
    (BOTH, "gen_length", 2, 0),
    (BOTH, "block_length", 2, 0),
    (BOTH, "cfg_scale", 0.5, -1),
    (BOTH, "remasking", "random", "never"),
    (BOTH, "threshold", None, "high"),
    (BOTH, "timeout", 60, 0),
]


def each(values: Any) -> list[Any]:
    """(path, name, value) of a table's rows."""
    return [
        pytest.param(path, name, value, id=f"{path.rsplit('/', 2)[-2]}-{name}-{str(value)[:24]}")
        for path, name, found in values
        for value in found
    ]


def rows(kind: int) -> list[Any]:
    """Of both tables, the values that are accepted (0) or refused (1)."""
    neutral = [(path, row[1], row[2 + kind]) for row in TABLE for path in row[0]]
    honoured = [(path, row[1], [row[2 + kind]]) for row in HONOURED for path in row[0]]
    return each(neutral + honoured)


@pytest.fixture(scope="module")
def http(server: Started) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("path, name, value", rows(0))
def test_accepted(http: httpx.Client, path: str, name: str, value: Any) -> None:
    answer = http.post(path, json={**BASE[path], name: value})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"]


@pytest.mark.parametrize("path, name, value", rows(1))
def test_refused_by_name(http: httpx.Client, path: str, name: str, value: Any) -> None:
    answer = http.post(path, json={**BASE[path], name: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == name
    assert error["type"] == "invalid_request_error" and name in error["message"]


@pytest.mark.parametrize(
    "path, kind",
    [
        (CHAT, chat_create_params.CompletionCreateParamsBase),
        (TEXT, completion_create_params.CompletionCreateParamsBase),
    ],
)
def test_no_parameter_of_the_sdk_is_dropped_silently(
    http: httpx.Client, path: str, kind: type
) -> None:
    """A value that no parameter can have is refused for every name that the SDK knows."""
    names = set(kind.__annotations__)
    assert {"model", "temperature", "stream_options"} <= names
    for name in sorted(names):
        answer = http.post(path, json={**BASE[path], name: {"no": ["such", "value"]}})
        assert answer.status_code == 400, (name, answer.text)
        assert answer.json()["error"]["param"] == name
        if name not in ("messages", "prompt"):
            answer = http.post(path, json={**BASE[path], name: None})
            assert answer.status_code == 200, (name, answer.text)


def test_lengths_that_contradict(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={**BASE[CHAT], "max_completion_tokens": 3})
    assert answer.status_code == 400 and "max_tokens=2" in answer.json()["error"]["message"]
    body = {**BASE[CHAT], "max_completion_tokens": 2, "gen_length": 2}
    assert http.post(CHAT, json=body).json()["usage"]["completion_tokens"] <= 2


def test_stream_options(http: httpx.Client) -> None:
    for path in BOTH:
        body = {**BASE[path], "stream": True}
        good = {"include_usage": True, "include_obfuscation": False}
        answer = http.post(path, json={**body, "stream_options": good})
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
        for wrong in ({"include_obfuscation": True}, {"unknown": 1}, {"include_usage": 1}):
            answer = http.post(path, json={**body, "stream_options": wrong})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "stream_options"


_PART = [{"type": "text", "text": "Hi."}]
_USAGE = {"include_usage": True, "continuous_usage_stats": True}
#: what load generators send, by their names
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm, chat": (
        CHAT,
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": _PART}],
            "max_tokens": 4,
            "max_completion_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": _USAGE,
        },
    ),
    "guidellm, text": (
        TEXT,
        {
            "model": "tiny",
            "prompt": "Hi.",
            "max_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": _USAGE,
        },
    ),
    "vllm bench serve, text": (
        TEXT,
        {
            "model": "tiny",
            "prompt": "Hi.",
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 4,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "vllm bench serve, chat": (
        CHAT,
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": _PART}],
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "sglang bench_serving": (
        TEXT,
        {
            "model": "tiny",
            "prompt": "Hi.",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 4,
            "stream": True,
            "ignore_eos": True,
        },
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_load_generators_send(http: httpx.Client, name: str) -> None:
    """They look for health first, and count tokens by the usage."""
    assert http.get("/health").status_code == 200
    path, body = STREAMS[name]
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert all("error" not in chunk for chunk in chunks)
    if "stream_options" in body:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 4
