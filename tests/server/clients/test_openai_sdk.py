"""The official openai SDK against a server, unmodified; written to pass under 2.x and 3.x."""

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.server.clients.conftest import KEYS, REQUESTS_PER_MINUTE
from tests.server.clients.started import Started

MODEL = "tiny"
#: one forward pass
FAST = {"steps": 1}


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(server: Started) -> Iterator[OpenAI]:
    """A client that checks every answer against the SDK's own types."""
    with OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def lenient(server: Started) -> Iterator[OpenAI]:
    """A client for streams of completions: the SDK's type knows no unfinished choice."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "dllmserve")
    assert abs(listed.created - time.time()) < 7200  # the session's server
    assert client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("gpt-4")
    assert (info.value.code, info.value.param) == ("model_not_found", "model")


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=say("Sort the numbers: 9 41 7"),
        temperature=0,
        max_completion_tokens=16,
    )
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.system_fingerprint and answer.system_fingerprint.startswith("dllmserve-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.role == "assistant"
    assert choice.message.content and "7 9 41" in choice.message.content
    assert not choice.message.tool_calls and choice.message.refusal is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # the server's default quality, which is no fixed number of forwards
    assert 1 <= answer.model_dump()["usage"]["forward_passes"] < 16


def test_chat_goes_on_with_the_message_that_it_gave(client: OpenAI) -> None:
    """As an object, and with every field that the SDK knows."""
    told = {"model": MODEL, "temperature": 0.0, "max_tokens": 4, "extra_body": FAST}
    first = client.chat.completions.create(messages=say("Hi."), **told)  # type: ignore[call-overload]
    message = first.choices[0].message
    texts = []
    for again in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        turns = [*say("Hi."), again, *say("Go on.")]
        answer = client.chat.completions.create(messages=turns, **told)  # type: ignore[call-overload]
        texts.append(answer.choices[0].message.content)
    assert texts[0] == texts[1] == texts[2]


def test_chat_goes_on_after_tools_that_another_model_called(client: OpenAI) -> None:
    """Tools of the conversation are named, and may not be chosen."""
    call: Any = {"id": "c1", "type": "function"}
    call["function"] = {"name": "sort", "arguments": '{"numbers": [9, 41, 7]}'}
    turns: Any = [
        {"role": "user", "content": "Sort the numbers: 9 41 7", "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": None},
        {"role": "tool", "tool_call_id": "c1", "content": "7 9 41"},
        *say("Sort the numbers: 9 41 7"),
    ]
    tool: Any = {"type": "function", "function": {"name": "sort", "parameters": {}}}
    told: dict[str, Any] = {"model": MODEL, "messages": turns, "temperature": 0, "max_tokens": 16}
    answer = client.chat.completions.create(
        **told, tools=[tool], tool_choice="none", store=True, reasoning_effort="low"
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_chat_contents_as_parts(client: OpenAI) -> None:
    parts: Any = [
        {"type": "text", "text": "Sort the "},
        {"type": "text", "text": "numbers: 9 41 7"},
    ]
    asked = [
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=4,
            extra_body=FAST,
        )
        for content in (parts, "Sort the numbers: 9 41 7")
    ]
    assert asked[0].choices == asked[1].choices
    assert asked[0].usage and asked[1].usage
    assert asked[0].usage.prompt_tokens == asked[1].usage.prompt_tokens
    picture: Any = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError) as info:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": picture}])
    assert info.value.param == "messages"


def test_chat_stream_with_usage(client: OpenAI) -> None:
    told: dict[str, Any] = {
        "model": MODEL,
        "messages": say("Sort the numbers: 9 41 7"),
        "temperature": 0,
    }
    told |= {"max_tokens": 16, "extra_body": {"block_length": 4}}
    whole = client.chat.completions.create(**told)
    with client.chat.completions.create(
        **told, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    *pieces, last = chunks
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)
    texts = [chunk.choices[0].delta.content for chunk in pieces]
    assert "".join(text or "" for text in texts) == whole.choices[0].message.content
    assert sum(bool(text) for text in texts) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in pieces]
    assert reasons == [None] * (len(pieces) - 1) + ["stop"]


def test_usage_in_every_chunk(client: OpenAI) -> None:
    """Benchmark tools ask for it; it counts what has been sent."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with client.chat.completions.create(
        model=MODEL,
        messages=say("Tell me about the sea."),
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options=options,
        extra_body={"block_length": 4, "ignore_eos": True},
    ) as stream:
        usages = [chunk.usage for chunk in stream if chunk.usage is not None]
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts) and len(set(counts)) > 3
    assert (counts[0], counts[-1]) == (0, 16)
    assert all(u.total_tokens == u.prompt_tokens + u.completion_tokens for u in usages)


def test_stream_helper(client: OpenAI) -> None:
    """The SDK's own accumulator of events, in whichever place this version has it."""
    places = [client.chat.completions]
    if hasattr(client.beta, "chat"):
        places.append(client.beta.chat.completions)
    for place in places:
        with place.stream(
            model=MODEL,
            messages=say("Sort the numbers: 9 41 7"),
            temperature=0,
            max_tokens=8,
            stream_options={"include_usage": True},
        ) as stream:
            kinds = [event.type for event in stream]
            answer = stream.get_final_completion()
        assert kinds.count("chunk") >= 3
        assert "content.delta" in kinds and kinds.count("content.done") == 1
        assert answer.choices[0].message.content and answer.usage is not None


def test_parse_helper_without_a_format(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=say("Sort the numbers: 9 41 7"), temperature=0, max_tokens=16
    )
    assert answer.choices[0].message.parsed is None


def test_completions_of_texts_and_token_ids(client: OpenAI) -> None:
    told: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 4, "extra_body": FAST}
    one = client.completions.create(prompt="Once upon a time", **told)
    assert one.id.startswith("cmpl-") and one.object == "text_completion"
    several = client.completions.create(prompt=["Once upon a time", "The law"], n=2, **told)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == one.choices[0].text
    assert several.usage and one.usage
    assert several.usage.prompt_tokens > one.usage.prompt_tokens
    ids = client.completions.create(prompt=[300, 301, 302], **told)
    assert ids.usage and ids.usage.prompt_tokens == 3
    both = client.completions.create(prompt=[[300, 301, 302], [303]], **told)
    assert both.choices[0].text == ids.choices[0].text and len(both.choices) == 2


def test_completions_stream_of_several(lenient: OpenAI) -> None:
    told: dict[str, Any] = {"model": MODEL, "prompt": ["Once upon a time", "The law"]}
    told |= {"temperature": 0, "max_tokens": 8, "extra_body": {"block_length": 4, "steps": 4}}
    whole = lenient.completions.create(**told)
    texts = {0: "", 1: ""}
    reasons: dict[int, Any] = {}
    with lenient.completions.create(**told, stream=True) as stream:
        for chunk in stream:
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]
    assert [reasons[0], reasons[1]] == [choice.finish_reason for choice in whole.choices]


def test_suffix(client: OpenAI, lenient: OpenAI) -> None:
    """Whole and in pieces; what the official client sends is all that is needed."""
    told: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    asked: dict[str, Any] = {"prompt": "Fellow citizens", "suffix": " of Representatives"}
    whole = client.completions.create(**told, **asked)
    (choice,) = whole.choices
    assert whole.usage is not None and 1 <= whole.usage.completion_tokens <= 6
    assert choice.finish_reason in ("stop", "length")
    with lenient.completions.create(**told, **asked, stream=True) as stream:
        assert "".join(c.choices[0].text for c in stream if c.choices) == choice.text
    alone = client.completions.create(**told, prompt="Fellow citizens")
    assert alone.usage is not None
    assert whole.usage.prompt_tokens > alone.usage.prompt_tokens


def test_echo_and_logit_bias(client: OpenAI) -> None:
    told: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": FAST}
    echoed = client.completions.create(prompt=[400], echo=True, max_tokens=1, **told)
    alone = client.completions.create(prompt=[400], max_tokens=1, **told)
    word = echoed.choices[0].text.removesuffix(alone.choices[0].text)
    assert word and echoed.choices[0].text == word + alone.choices[0].text
    forced = client.completions.create(prompt="Say", max_tokens=3, logit_bias={"400": 100}, **told)
    assert forced.choices[0].text == 3 * word
    assert forced.choices[0].finish_reason == "length"


def test_stop(client: OpenAI) -> None:
    told: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0}
    told |= {"max_tokens": 12, "extra_body": {"steps": 4}}
    whole = client.completions.create(**told).choices[0].text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    cut = client.completions.create(**told, stop=["never in there", stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_seed_makes_draws_repeatable(client: OpenAI) -> None:
    def draw(seed: int, n: int = 1) -> list[str]:
        answer = client.completions.create(
            model=MODEL,
            prompt="The",
            max_tokens=8,
            temperature=1.5,
            seed=seed,
            n=n,
            extra_body={"steps": 2},
        )
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert draw(7) == first
    three = draw(7, n=3)
    assert three[0] == first[0] and len(set(three)) == 3
    assert draw(8) != first


def test_diffusion_options_through_extra_body(client: OpenAI) -> None:
    options: dict[str, Any] = {"steps": 2, "block_length": 8, "cache": "none", "cfg_scale": 0.5}
    options |= {"remasking": "random", "ignore_eos": True}
    answer = client.chat.completions.create(
        model=MODEL, messages=say("Hi."), max_tokens=8, extra_body=options
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.model_dump()["usage"]["forward_passes"] == 2
    assert answer.model_dump()["usage"]["tokens_per_forward"] == 4


def test_wrong_requests_are_bad_request_errors(client: OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str | None, str]] = [
        ({"max_tokens": 100_000}, "max_tokens", "invalid_parameter"),
        ({"max_tokens": 2048}, "messages", "context_length_exceeded"),
        ({"temperature": -1}, "temperature", "invalid_parameter"),
        ({"n": 9}, "n", "invalid_parameter"),
        ({"stop": list("abcdefghijklmnopq")}, "stop", "invalid_parameter"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_parameter"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "invalid_parameter"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field", "invalid_parameter"),
        ({"extra_body": {"unmask": "no such rule"}}, "unmask", "invalid_parameter"),
    ]
    for changed, param, code in cases:
        with pytest.raises(openai.BadRequestError) as info:
            client.chat.completions.create(
                **{"model": MODEL, "messages": say("Hi."), **changed}  # type: ignore[call-overload]
            )
        found = info.value
        assert (found.status_code, found.param, found.code) == (400, param, code), found
        assert found.type == "invalid_request_error"
        assert found.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=say("Hi."))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


def test_a_deadline_is_an_internal_server_error(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as info:
        client.completions.create(
            model=MODEL, prompt="a", max_tokens=2000, extra_body={"timeout": 0.05}
        )
    assert info.value.status_code == 504
    assert (info.value.type, info.value.code) == ("timeout", "deadline_exceeded")


def test_a_stream_that_fails_raises(lenient: OpenAI) -> None:
    with pytest.raises(openai.APIError) as info:
        stream = lenient.completions.create(
            model=MODEL, prompt="a", max_tokens=2000, stream=True, extra_body={"timeout": 0.05}
        )
        with stream:
            for _ in stream:
                continue
    assert info.value.code == "deadline_exceeded"
    assert not isinstance(info.value, openai.APIStatusError)  # the answer began with 200


def test_raw_responses(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "my-own.id_1"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "my-own.id_1"
    assert raw.headers["content-type"] == "application/json"
    parsed = raw.parse()
    assert parsed._request_id == "my-own.id_1"
    with client.completions.with_streaming_response.create(
        model=MODEL, prompt="a", max_tokens=1, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def test_a_cancelled_stream_frees_the_engine(lenient: OpenAI, server: Started) -> None:
    def gauge(name: str) -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            page = answer.read().decode()
        lines = [line for line in page.splitlines() if line.startswith(f"dllmserve:{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    aborted = gauge("requests_aborted_total")
    stream = lenient.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=400,
        stream=True,
        extra_body={"block_length": 4, "ignore_eos": True},
    )
    assert next(iter(stream)).choices
    assert gauge("num_requests_running") == 1
    stream.close()
    until = time.monotonic() + 20
    while gauge("num_requests_running") or gauge("num_requests_waiting"):
        assert time.monotonic() < until, "the engine still runs the request"
        time.sleep(0.02)
    assert gauge("requests_aborted_total") == aborted + 1


def test_fifty_requests_at_once(server: Started) -> None:
    async def main() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            asked = [
                client.chat.completions.create(
                    model=MODEL,
                    messages=say(f"What is {i % 5} + 1?"),
                    temperature=0,
                    max_tokens=4,
                    extra_body=FAST,
                )
                for i in range(50)
            ]
            answers = list(await asyncio.gather(*asked))
            chunks = 0
            stream = await client.chat.completions.create(
                model=MODEL, messages=say("Hi."), max_tokens=4, stream=True
            )
            async with stream:
                async for _ in stream:
                    chunks += 1
            assert chunks > 1
            return answers

    answers = asyncio.run(main())
    texts = [answer.choices[0].message.content for answer in answers]
    assert len(texts) == 50 and len({answer.id for answer in answers}) == 50
    assert all(texts[i] == texts[i % 5] for i in range(50))


def guarded(server: Started, key: str, retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries)


def test_keys(guarded_server: Started) -> None:
    with guarded(guarded_server, "not-a-key-of-this-server") as client:
        with pytest.raises(openai.AuthenticationError) as info:
            client.models.list()
        assert info.value.code == "invalid_api_key"
        assert info.value.type == "authentication_error"
    with guarded(guarded_server, KEYS[0]) as client:
        assert len(client.models.list().data) == 1


def test_a_used_up_key_is_a_rate_limit_error(guarded_server: Started) -> None:
    with guarded(guarded_server, KEYS[1]) as client:
        for _ in range(REQUESTS_PER_MINUTE):
            client.models.list()
        with pytest.raises(openai.RateLimitError) as info:
            client.models.list()
    assert (info.value.type, info.value.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert 0 < int(info.value.response.headers["retry-after"]) <= 60 / REQUESTS_PER_MINUTE


def test_the_sdk_retries_when_the_server_was_full(guarded_server: Started) -> None:
    name = guarded_server_model(guarded_server)
    long: dict[str, Any] = {"model": name, "prompt": "a", "max_tokens": 200, "stream": True}
    long["extra_body"] = {"block_length": 2, "ignore_eos": True}
    with (
        guarded(guarded_server, KEYS[2]) as holder,
        guarded(guarded_server, KEYS[3]) as once,
        guarded(guarded_server, KEYS[3], retries=3) as patient,
    ):
        with holder.completions.create(**long) as stream:
            assert next(iter(stream)).choices
            with pytest.raises(openai.InternalServerError) as info:
                once.completions.create(model=name, prompt="b", max_tokens=1)
            assert info.value.status_code == 503
            assert (info.value.type, info.value.code) == ("overloaded_error", "overloaded")
            assert int(info.value.response.headers["retry-after"]) >= 1
            found: list[Any] = []

            def ask() -> None:
                raw = patient.completions.with_raw_response.create(
                    model=name, prompt="b", max_tokens=1
                )
                found.append((raw.retries_taken, raw.parse()))

            asking = threading.Thread(target=ask)
            asking.start()
            until = time.monotonic() + 30
            while sum(line["status"] == 503 for line in guarded_server.requests()) < 2:
                assert time.monotonic() < until
                time.sleep(0.02)
        asking.join(120)
    ((retries, answer),) = found
    assert retries >= 1
    assert answer.choices[0].finish_reason in ("stop", "length")


def guarded_server_model(server: Started) -> str:
    with guarded(server, KEYS[2]) as client:
        return client.models.list().data[0].id
