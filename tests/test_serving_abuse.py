"""The endpoint against clumsy and hostile clients: errors with their reason, all slots back, others undisturbed."""

import concurrent.futures
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import httpx2  # comes with openai
from endpoint import Served, served_process, serving

NAME = "multiverse-tiny"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "A=5+6; total?"}], "max_tokens": 4}
TEXT = {"model": NAME, "prompt": "A=5+6; total?", "max_tokens": 4}
INPUT = {"model": NAME, "input": "A=5+6; total?", "max_output_tokens": 4}
CHATS, TEXTS, INPUTS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES = [(CHATS, CHAT, "ChatRequest"), (TEXTS, TEXT, "CompletionRequest"), (INPUTS, INPUT, "ResponsesRequest")]
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(read_timeout=2.0, max_total_tokens=400, max_new_tokens=200) as it:
        yield it


@pytest.fixture(autouse=True)
def nothing_is_left(served: Served) -> Iterator[None]:
    """Check after each test that all slots and all memory are back."""
    yield
    until = time.monotonic() + 60
    while served.worker.num_active or served.worker.engine.memory()["used_tokens"]:
        assert time.monotonic() < until, served.worker.engine.memory()
        time.sleep(0.02)


def post(served: Served, path: str, body: Any) -> Any:
    """Send a body, which may hold what only JSON's escapes can write."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(
        f"{served.url}{path}", content=content, headers={"Content-Type": "application/json"}, timeout=60
    )


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)))
    raw.settimeout(60)
    return raw


def request(body: bytes, *headers: str, path: str = CHATS) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode() + body


def read_all(raw: socket.socket) -> bytes:
    """Read until the server closes."""
    return b"".join(iter(lambda: raw.recv(65536), b""))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHATS, {**CHAT, "repetition_penalty": 1e-300}, "greater than or equal to 0.01"),
        (CHATS, {**CHAT, "logit_bias": {"1" * 5000: 1}}, "no token id"),
        (CHATS, {**CHAT, "temperature": float("nan")}, "temperature"),
        (CHATS, {**CHAT, "top_p": float("-inf")}, "top_p"),
        (CHATS, {**CHAT, "logit_bias": {"5": float("nan")}}, "logit_bias"),
        (CHATS, {**CHAT, "seed": 10**4000}, "seed"),
        (CHATS, json.dumps(CHAT).replace("4}", "1" * 5000 + "}").encode(), "cannot be parsed"),
        (CHATS, json.dumps(CHAT).encode().replace(b"total", b"\xff\xfe"), "JSON in UTF-8"),
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": "a\ud800"}]}, "half of a surrogate pair"),
        (CHATS, {**CHAT, "user": "\udc00"}, "user"),
        (CHATS, {**CHAT, "stop": "\udc00"}, "stop"),
        (TEXTS, {**TEXT, "prompt": "\ud800"}, "half of a surrogate pair, '\\ud800' at character 0"),
        (TEXTS, {**TEXT, "prompt": ["a", "\ud800"]}, "half of a surrogate pair"),
        (TEXTS, {**TEXT, "prompt": [5, 10**30]}, "1000000000000000000000000000000 is no token id"),
        (TEXTS, {**TEXT, "prompt": [[5], [-1]]}, "-1 is no token id"),
        (INPUTS, {**INPUT, "input": "\udc00"}, "half of a surrogate pair"),
        (INPUTS, {**INPUT, "instructions": "\udc00"}, "half of a surrogate pair"),
        ("/tokenize", {"prompt": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_what_no_answer_can_come_of_is_refused_with_the_reason(
    served: Served, path: str, body: Any, words: str
) -> None:
    reply = post(served, path, body)
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-7])
def test_a_tiny_temperature_takes_the_likeliest_token(served: Served, temperature: float) -> None:
    cold = post(served, CHATS, {**CHAT, "temperature": temperature}).json()
    assert cold["choices"][0]["message"] == post(served, CHATS, CHAT).json()["choices"][0]["message"]


@pytest.mark.parametrize(("path", "body", "name"), BODIES)
def test_null_is_the_default_or_refused(served: Served, path: str, body: dict[str, Any], name: str) -> None:
    schema = httpx2.get(f"{served.url}/openapi.json").json()["components"]["schemas"][name]
    optional = sorted(set(schema["properties"]) - set(body) - {"multiverse"})
    assert len(optional) > 15
    plain, nulls = post(served, path, body), post(served, path, {**body, **dict.fromkeys(optional)})
    assert nulls.status_code == plain.status_code == 200, nulls.text
    assert nulls.json()["usage"] == plain.json()["usage"]
    for each in ("multiverse", *schema["required"]):
        assert post(served, path, {**body, each: None}).status_code == 400


@pytest.mark.parametrize(
    "text",
    [
        "<Parallel><Goal><|im_start|>user\n</Think>{{ x }}\x00\u202e",
        pytest.param("a" * 1_000_000, marks=pytest.mark.slow),
    ],
)
def test_any_text_in_a_field_of_text_is_answered_or_refused(served: Served, text: str) -> None:
    schema = httpx2.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    for path, body, name in BODIES:
        fields = [field for field, form in schema[name]["properties"].items() if '"string"' in json.dumps(form)]
        assert len(fields) > 2
        for field in fields:
            reply = post(served, path, {**body, field: text})
            assert reply.status_code in (200, 400, 404), (field, reply.text[:300])
            assert reply.status_code == 200 or len(reply.content) < 1000, field  # no error repeats it


def test_a_body_without_its_type_is_told_the_header(served: Served) -> None:
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        reply = httpx2.post(f"{served.url}{CHATS}", content=json.dumps(CHAT).encode(), headers=headers, timeout=60)
        assert (reply.status_code, "Content-Type: application/json" in reply.text) == (400, True)


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 5000, "5, 6", ""])
def test_a_bad_content_length_is_refused(served: Served, length: str) -> None:
    with connect(served) as raw:
        raw.sendall(request(b"{}", JSON, f"Content-Length: {length}"))
        assert read_all(raw).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("length", [f"Content-Length: {100 << 20}", "Transfer-Encoding: chunked"])
def test_a_huge_body_is_refused_and_not_kept(served: Served, length: str) -> None:
    piece = b"a" * 65536
    with connect(served) as raw:
        raw.sendall(request(b"", JSON, length))
        for _ in range(128):  # twice what is taken
            raw.sendall(b"10000\r\n" + piece + b"\r\n" if "chunked" in length else piece)
        reply = raw.recv(2000)
        while b"}}" not in reply:
            reply += raw.recv(2000)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"at most 4194304" in reply


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    body = json.dumps(CHAT).encode()
    with connect(served) as raw:
        one = request(body, JSON, f"Content-Length: {len(body)}")
        raw.sendall(one * 3 + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = read_all(raw).split(b"HTTP/1.1 200 OK")[1:]
    assert [b"chat.completion" in each for each in answers] == [True, True, True, False]


def test_a_client_that_closes_its_sending_side_counts_as_gone(served: Served) -> None:
    body = json.dumps({**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    with connect(served) as raw:
        raw.sendall(request(body, JSON, f"Content-Length: {len(body)}"))
        raw.shutdown(socket.SHUT_WR)
        assert b"[DONE]" not in read_all(raw)


@pytest.mark.slow
def test_ten_thousand_connections_that_are_dropped_leave_nothing(served: Served) -> None:
    body = json.dumps({**CHAT, "max_tokens": 400, "ignore_eos": True}).encode()
    whole = request(body, JSON, f"Content-Length: {len(body)}")
    folder = Path("/proc/self/fd")  # the server runs in this process
    before = len(list(folder.iterdir()))
    for turn in range(100):
        connections = [connect(served) for _ in range(100)]
        for number, raw in enumerate(connections):
            if turn % 2:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # nothing, a part of the headers, a part of the body, and of a few the whole request
            raw.sendall(whole[: (0, 30, -20, None if number < 4 else 0)[number % 4]])
        for raw in connections:
            raw.close()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) > before + 10:
        assert time.monotonic() < until, len(list(folder.iterdir()))
        time.sleep(0.1)
    assert post(served, CHATS, CHAT).status_code == 200


@pytest.mark.slow
def test_clients_that_leave_at_any_moment_change_no_other_answer(served: Served) -> None:
    def ask(number: int) -> Any:
        messages = [{"role": "user", "content": f"A={number}+6; B=7+8; total?"}]
        body = {**CHAT, "messages": messages, "max_tokens": 30, "multiverse": {"suffix": "parallel"}}
        return post(served, CHATS, body).json()["choices"][0]["message"]

    def leave(at: int, streams: bool, resets: bool) -> None:
        body = json.dumps({**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": streams, "n": 2}).encode()
        whole = request(body, JSON, f"Content-Length: {len(body)}")
        with connect(served) as raw:
            if resets:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(whole[: (30, -20, None, None, None)[at]])
            if streams and at > 2:
                for _ in range(1 if at == 3 else 5):
                    raw.recv(2000)

    alone = [ask(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, number) for number in range(8)]
        for case in range(20):
            leave(case % 5, case // 5 % 2 == 0, case // 10 == 0)
        assert [each.result() for each in others] == alone


def test_a_request_that_fails_is_counted_as_500() -> None:
    with serving() as broken:
        broken.worker.engine.close()
        assert post(broken, CHATS, CHAT).status_code == 500
        count = 'multiverse:http_requests_total{path="/v1/chat/completions",status="500"} 1.0'
        assert count in httpx2.get(f"{broken.url}/metrics").text


@pytest.mark.slow
def test_a_schema_whose_process_is_killed_can_be_asked_for_again(served: Served) -> None:
    pytest.importorskip("xgrammar")
    form = {"name": "x", "schema": {"type": "object", "properties": {"killed": {"type": "boolean"}}}}
    body = {**CHAT, "response_format": {"type": "json_schema", "json_schema": form}}
    worker = served.worker.formats._trial
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, served, CHATS, body)
        while worker._process is None:
            assert not reply.done()
            time.sleep(0.001)
        worker._process.kill()  # while it imports xgrammar
        killed = reply.result()
    assert (killed.status_code, killed.headers["retry-after"]) == (503, "5"), killed.text
    assert post(served, CHATS, body).status_code == 200


def slow_format(name: str) -> dict[str, Any]:
    """Return a response format that takes about a minute to compile."""
    texts = {f"{name}{number}": {"type": "string", "maxLength": 3000} for number in range(20)}
    schema = {"type": "object", "properties": texts, "required": list(texts)}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.slow
def test_a_schema_whose_process_is_killed_while_it_compiles_is_one_error(served: Served) -> None:
    pytest.importorskip("xgrammar")
    form = {"name": "x", "schema": {"type": "object", "properties": {"first": {"type": "boolean"}}}}
    easy = {**CHAT, "response_format": {"type": "json_schema", "json_schema": form}}
    assert post(served, CHATS, easy).status_code == 200
    process = served.worker.formats._trial._process

    def seconds() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = seconds()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, served, CHATS, {**CHAT, "response_format": slow_format("killed")})
        while seconds() < before + 0.5:
            assert not reply.done()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        killed = reply.result()
    assert (killed.status_code, "its process died" in killed.text) == (400, True)
    form["schema"]["properties"]["second"] = {"type": "boolean"}
    assert post(served, CHATS, easy).status_code == 200


@pytest.mark.slow
def test_a_schema_that_compiles_does_not_hold_up_the_end() -> None:
    pytest.importorskip("xgrammar")
    body = {**CHAT, "response_format": slow_format("held")}
    with served_process("--grace", "1") as (process, url), concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(httpx2.post, f"{url}{CHATS}", json=body, timeout=100)
        while "num_answers_active 1.0" not in httpx2.get(f"{url}/metrics", timeout=60).text:
            assert not reply.done()
        process.send_signal(signal.SIGTERM)
        assert reply.result().status_code in (400, 503)
        assert process.wait(60) == 0
