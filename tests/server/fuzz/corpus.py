"""Requests on the edge of what is allowed, and over it, with the statuses that are right."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

BODY = b'{"prompt":"a","max_tokens":2}'
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
#: a client's fault, whichever
REFUSED = frozenset(range(400, 500)) - {404}
ANY = frozenset({200, 204}) | frozenset(range(400, 500))


@dataclass(frozen=True)
class Case:
    """Bytes to send on a connection of their own.

    Attributes:
        name: for messages.
        data: everything that is sent.
        statuses: of the answers; a connection that is closed without one is always right.
        slow: the server has to wait for more of it.
    """

    name: str
    data: bytes
    statuses: frozenset[int] = REFUSED
    slow: bool = False


def request(
    method: str, path: str, body: bytes | None = None, *headers: str, length: str | None = None
) -> bytes:
    """An HTTP request, with a true Content-Length unless another is given."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body is not None:
        if not any(h.lower().startswith("content-type") for h in headers):
            lines.append("Content-Type: application/json")
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def valid() -> list[bytes]:
    """One request of each kind, all of them right and cheap."""
    message = {"role": "user", "content": "Hi."}
    bodies: list[tuple[str, object]] = [
        (CHAT, {"messages": [message], "max_tokens": 2}),
        (CHAT, {"messages": [message], "max_tokens": 4, "stream": True, "block_length": 2}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]}),
        (COMPLETIONS, {"prompt": ["a", [1, 2]], "max_tokens": 2, "seed": 7, "stop": ["x", "y"]}),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9}),
        (COMPLETIONS, {"prompt": "a", "n": 2, "logit_bias": {"5": -1.5}, "echo": True}),
        ("/v1/generate", {"prompt": "a", "temperature": 0.6, "gen_length": 4}),
        ("/v1/generate_batch", {"prompts": ["a", "b"], "gen_length": 4, "steps": 2}),
        ("/v1/infill", {"template": ["a", {"hole": 4, "name": "x"}, [66]], "temperature": 0}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 4, "stream": True}),
        ("/v1/generate/stream", {"prompt": "a", "gen_length": 4, "sparse": {"enabled": True}}),
    ]
    found = [request("POST", path, json.dumps(body).encode()) for path, body in bodies]
    paths = ("/v1/result/0?wait=0", "/v1/models", "/v1/health", "/metrics", "/openapi.json")
    found += [request("GET", path, None, "X-Request-Id: abc-1", "Accept: */*") for path in paths]
    return [*found, request("DELETE", "/v1/result/1")]


def corpus() -> list[Case]:
    """All cases."""
    return [*_bodies(), *_lengths(), *_chunks(), *_heads(), *_paths(), *_lines(), *_logs()]


def _post(name: str, body: bytes, statuses: frozenset[int] = frozenset({400})) -> Case:
    return Case(name, request("POST", COMPLETIONS, body), statuses)


def _bodies() -> Iterator[Case]:
    """What the JSON is."""
    nested = b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    yield _post("200,000 arrays in each other", nested)
    yield _post("200,000 objects in each other", b'{"a":' * 200_000 + b"1" + b"}" * 200_000)
    yield _post("200,000 open brackets", b"[" * 200_000)
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000, b"0x10"):
        for field in (b"temperature", b"seed", b"max_tokens", b"timeout", b"threshold"):
            body = b'{"prompt":"a","%b":%b}' % (field, number)
            yield _post(f"{field.decode()}={number[:9].decode()}", body)
    yield _post("a fraction of 5,000 digits", b'{"prompt":"a","top_p":1.' + b"1" * 5000 + b"}")
    for text in (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"):
        yield _post(f"bad UTF-8 {text.hex()}", b'{"prompt":"%b"}' % text)
    for field in (b"prompt", b"model", b"user", b"stop", b"unmask", b"nothing", b"\\ud800"):
        both = frozenset({400, 404})
        body = b'{"prompt":"a","max_tokens":2,"%b":"\\ud800"}' % field
        yield _post(f"a lone surrogate in {field.decode()}", body, both)
    yield _post("NUL in a text", b'{"prompt":"a\\u0000b","max_tokens":2}', frozenset({200}))
    yield _post("NUL in the JSON", b'{"prompt":"a\0b"}')
    yield _post("a key twice", b'{"prompt":"a","prompt":"b","max_tokens":2}')
    yield _post("a key twice, the second wrong", b'{"prompt":"a","prompt":7}')
    for body in (b"", b" ", b"null", b"[]", b"5", b'"a"', b"true", b"{", b"}", b"{}{}", b"\0"):
        yield _post(f"the body {body!r}", body)
    yield _post("UTF-16", BODY.decode().encode("utf-16"))
    yield _post("a byte order mark", b"\xef\xbb\xbf" + BODY, frozenset({200}))
    yield _post("1 MB of prompt", b'{"prompt":"' + b"a" * 1_000_000 + b'"}')
    yield _post("3 MB of body", b'{"prompt":"' + b"a" * 3_000_000 + b'"}', frozenset({413}))
    yield _post("200,000 token ids", b'{"prompt":[' + b"1," * 200_000 + b"1]}")
    yield _post("5,000 prompts", b'{"prompt":[' + b'"a",' * 5000 + b'"a"]}')
    yield _post(
        "5,000 fields", b'{"prompt":"a"%b}' % b"".join(b',"f%d":1' % i for i in range(5000))
    )
    bias = b",".join(b'"%d":1' % i for i in range(5000))
    yield _post("5,000 biases", b'{"prompt":"a","logit_bias":{%b}}' % bias)
    message = b'{"role":"user","content":"a"},'
    body = b'{"messages":[' + message * 5000 + message[:-1] + b"]}"
    yield Case("5,000 messages", request("POST", CHAT, body), frozenset({400}))


def _lengths() -> Iterator[Case]:
    """What the head says of the body."""
    for length in ("-1", "+5", "0x1d", "5, 5", "29 29", "", "1e1", "9" * 30, "\u0665", "\xb2"):
        data = request("POST", COMPLETIONS, BODY, length=length)
        yield Case(f"Content-Length: {length}", data, slow=True)
    two = request("POST", COMPLETIONS, BODY, "Content-Length: 28")
    yield Case("two lengths", two, frozenset({400}))
    short = request("POST", COMPLETIONS, BODY, length="10")
    yield Case("a length that is too small", short, frozenset({400}))
    long = request("POST", COMPLETIONS, BODY, length="100")
    yield Case("a length that is too large", long, frozenset({408}), slow=True)
    huge = request("POST", COMPLETIONS, BODY, length="999999999999")
    yield Case("a length of a terabyte", huge, frozenset({413}), slow=True)
    yield Case("no length", request("POST", COMPLETIONS) + BODY)


def _chunks() -> Iterator[Case]:
    """Chunked bodies."""
    head = request("POST", COMPLETIONS, None, "Content-Type: application/json", "%s")
    chunked = head.replace(b"%s", b"Transfer-Encoding: chunked")
    size = b"%x" % len(BODY)
    whole = chunked + size + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
    yield Case("a chunked body", whole, frozenset({200}))
    small = chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    yield Case("a chunk for each byte", small, frozenset({200}))
    yield Case("a trailer", whole[:-2] + b"X-Api-Key: abc\r\n\r\n", frozenset({200}))
    for bad in (b"zz", b"-1", b"0x5", b"f" * 20, b"", b" 1d", b"1d\n", b"\0"):
        data = chunked + bad + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
        yield Case(f"the chunk size {bad!r}", data, ANY, slow=True)
    extension = chunked + size + b";" + b"a" * 70_000 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
    yield Case("a chunk extension of 70 kB", extension, ANY)
    yield Case("no last chunk", whole[:-5], frozenset({408}), slow=True)
    both = request("POST", COMPLETIONS, None, "Content-Type: application/json", "Content-Length: 5")
    smuggled = both[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + whole[len(chunked) :]
    yield Case("both kinds of length", smuggled)
    for coding in (b"gzip", b"gzip, chunked", b"chunked, chunked", b"xchunked", b"chunked\t"):
        data = head.replace(b"%s", b"Transfer-Encoding: " + coding) + whole[len(chunked) :]
        yield Case(f"Transfer-Encoding: {coding!r}", data, ANY)
    for kind in ("text/plain", "multipart/form-data; boundary=a", "application/jsonx", "", "*/*"):
        data = request("POST", COMPLETIONS, BODY, f"Content-Type: {kind}")
        yield Case(f"Content-Type: {kind}", data, frozenset({415}))
    data = request("POST", COMPLETIONS, BODY, "Content-Encoding: br")
    yield Case("a body of an unknown coding", data, frozenset({415}))
    data = request("POST", COMPLETIONS, BODY, "Content-Encoding: gzip")
    yield Case("a body that is not compressed as it says", data, frozenset({400}))


def _heads() -> Iterator[Case]:
    """Headers."""
    many = [f"X-{i}: a" for i in range(200)]
    yield Case("200 headers", request("GET", "/v1/health", None, *many), frozenset({431}))
    long = request("GET", "/v1/health", None, "X-A: " + "a" * 70_000)
    yield Case("a header of 70 kB", long, frozenset({431}))
    for line in (
        "X: \0",
        "X: a\x7f\x01",
        "X\0: a",
        "X : a",
        ": a",
        "X",
        " folded",
        "Ä: ö",
        "X: \x1b[2J",
    ):
        data = request("GET", "/v1/health", None, line)
        yield Case(f"the header {line!r}", data, ANY)
    yield Case("no host", b"GET /v1/health HTTP/1.1\r\n\r\n", ANY)
    data = request("GET", "/v1/health", None, "Host: evil", "Host: worse/v1/health?")
    yield Case("three hosts", data, ANY)
    data = request("POST", COMPLETIONS, BODY, "Expect: 100-continue")
    yield Case("Expect", data, frozenset({100, 200}))
    data = request("POST", COMPLETIONS, BODY, "Expect: 200-maybe")
    yield Case("another Expect", data, ANY)
    for kind in ("h2c", "websocket", "a\tb"):
        head = ("Connection: Upgrade", f"Upgrade: {kind}", "Sec-WebSocket-Key: YQ==")
        data = request("GET", "/v1/health", None, *head)
        yield Case(f"an upgrade to {kind}", data, ANY)
    for key in ("Bearer", "Bearer  ", "Basic YTpi", "Bearer " + "a" * 9000, "Bearer \x80"):
        data = request("GET", "/v1/models", None, f"Authorization: {key}")
        yield Case(f"Authorization: {key[:20]!r}", data, ANY)


def _paths() -> Iterator[Case]:
    """Targets."""
    largest = 2**53 - 1
    absent = frozenset({404})
    yield Case("the largest id", request("GET", f"/v1/result/{largest}"), absent)
    ids = (str(largest + 1), "9" * 30, "9" * 5000, "-1", "+1", "01", "%201", "1%20", "1.0", "1e1")
    ids += ("0x1", "\u0661", "%D9%A1", "true", "NaN", "1_0", "%00", "1%00", "1%0a")
    for number in ids:
        data = request("GET", f"/v1/result/{number}")
        yield Case(f"the id {number[:20]!r}", data, frozenset({400, 404}))
        data = request("DELETE", f"/v1/result/{number}")
        yield Case(f"the id {number[:20]!r}, deleted", data, frozenset({400, 404}))
    for query in ("wait=NaN", "wait=inf", "wait=-1", "wait=61", "wait=1e999", "wait=", "details=1"):
        data = request("GET", f"/v1/result/{largest}?{query}")
        yield Case(f"?{query}", data, frozenset({400}))
    missing = frozenset({400, 404})
    for path in ("//", "/../etc/passwd", "/%2e%2e/etc/passwd", "/v1//models", "/V1/models"):
        yield Case(f"the path {path}", request("GET", path), missing)
    for path in (
        "/docs/..%2f..%2fapp.py",
        "/docs/%2e%2e",
        "/v1/models/%0d%0aX: y",
        "/\x7f",
        "/%ff",
    ):
        yield Case(f"the path {path!r}", request("GET", path), missing)
    yield Case("a target of 20 kB", request("GET", "/" + "a" * 20_000), frozenset({414}))
    yield Case("an absolute target", request("GET", "http://evil/v1/health"), ANY)
    yield Case("a fragment", request("GET", "/v1/health#x"), ANY)
    yield Case("no slash", request("GET", "v1/health"), ANY)
    yield Case("OPTIONS *", request("OPTIONS", "*"), ANY)


def _lines() -> Iterator[Case]:
    """Request lines, and what is no HTTP/1.1 at all."""
    for version in ("HTTP/0.9", "HTTP/2.0", "HTTP/9.9", "HTTP/1.10", "HTTP/", "http/1.1", ""):
        data = f"GET /v1/health {version}\r\nHost: a\r\n\r\n".encode()
        yield Case(f"the version {version!r}", data, ANY, slow=True)
    for method in ("get", "GEET", "", "CONNECT", "TRACE", "PUT", "HEAD", "G\0T", "PRI"):
        data = request(method, "/v1/models")
        yield Case(f"the method {method!r}", data, ANY)
    yield Case("blank lines before it", b"\r\n\r\n\r\n" + request("GET", "/v1/health"), ANY)
    yield Case("line feeds alone", b"GET /v1/health HTTP/1.1\nHost: a\n\n", ANY, slow=True)
    yield Case("carriage returns alone", b"GET /v1/health HTTP/1.1\rHost: a\r\r", ANY, slow=True)
    yield Case("nothing", b"", frozenset({408}), slow=True)
    yield Case("half a head", request("GET", "/v1/health")[:-3], frozenset({408}), slow=True)
    yield Case("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", slow=True)
    yield Case("TLS", bytes.fromhex("16030100c8010000c40303") + bytes(range(200)))
    yield Case("all bytes", bytes(range(256)) * 16)
    yield Case("100 kB of one letter", b"a" * 100_000, slow=True)
    one = request("GET", "/v1/health")
    yield Case("10 at once", one * 10, frozenset({200}))
    yield Case("60 at once", one * 60, frozenset({200, 400}))
    yield Case("one and rubbish", one + b"\0\1\2\3", frozenset({200, 400}))
    post = request("POST", COMPLETIONS, BODY)
    yield Case(
        "a request in a body", post + request("POST", "/nowhere", post), frozenset({200, 404})
    )


def _logs() -> Iterator[Case]:
    """What would write a line of its own into a log, if it could."""
    line = '\\n{"level":"INFO","message":"request","status":500}'
    for field in ("prompt", "model", "user", line.replace('"', '\\"')):
        body = f'{{"prompt":"a","max_tokens":2,"{field}":"{line}"}}'.replace(
            '":"\\n{"', '":"\\n{\\"'
        )
        yield _post(f"a line in {field[:10]}", body.encode(), frozenset({200, 400, 404}))
    for text in ("a" * 65, "\x1b[31mred", "a b", '"}', "\x85", "\u2028", "a;b", "%0a", ""):
        data = request("GET", "/v1/health", None, f"X-Request-Id: {text}")
        yield Case(f"X-Request-Id: {text[:10]!r}", data, ANY)
    twice = request("GET", "/v1/health", None, "X-Request-Id: a", "X-Request-Id: b")
    yield Case("two request ids", twice, frozenset({200}))
    huge = request("GET", "/v1/health", None, "X-Request-Id: " + "a" * 60_000)
    yield Case("a request id of 60 kB", huge, ANY)
