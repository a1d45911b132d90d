"""Raw sockets: how requests arrive, and how connections end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from muster.serve.receipt import EXPIRY_GAP_S, Spaced

BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
START = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEAD = START + b"Content-Length: %d\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def hasty(serving: Any, model: Any) -> Iterator[Any]:
    with serving(model, header_s=0.4, body_s=0.4, header_bytes=4096) as served:
        yield served


def connect(served: Any) -> socket.socket:
    return socket.create_connection(served.address, timeout=15)


def read_to_the_end(sock: socket.socket) -> bytes:
    """Everything until the server closes; fails when it has not after the socket's timeout."""
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


def read_answer(sock: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(
        next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1]
    )
    while len(body) < length:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


def dribble(sock: socket.socket, data: bytes) -> None:
    for _ in range(300):  # the deadlines here are far shorter
        sock.sendall(data)
        time.sleep(0.02)


def error_of(answer: bytes) -> str:
    message: str = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    return message


@pytest.mark.parametrize("partial", [b"G", b"GET /health HTTP/1.1\r\n", GET[:-2]])
def test_a_partial_header_is_refused_at_its_deadline(hasty: Any, partial: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(partial)
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer) == "the header was not complete in time, at most 0.4 s"


@pytest.mark.parametrize(
    "head", [HEAD % len(BODY), HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")]
)
def test_a_partial_body_is_refused_at_its_deadline(hasty: Any, head: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(head + (BODY[:5] if b"chunked" not in head else b"5\r\n12345\r\n"))
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer) == "the body was not complete in time, at most 0.4 s"
    assert httpx.get(f"{hasty.url}/health").status_code == 200


@pytest.mark.parametrize("start", [b"", HEAD % 10_000])
def test_dribbling_bytes_do_not_extend_the_deadline(hasty: Any, start: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(start)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            dribble(sock, b"x")


def test_a_connection_that_never_sends_is_closed(hasty: Any) -> None:
    with connect(hasty) as sock:
        assert read_to_the_end(sock) == b""


def test_the_next_request_of_a_connection_has_a_deadline_of_its_own(hasty: Any) -> None:
    with connect(hasty) as sock:
        for _ in range(2):
            sock.sendall(GET)
            assert read_answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(HEAD % len(BODY) + BODY)
        assert read_answer(sock).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)  # an idle connection is kept
        sock.sendall(GET)
        assert read_answer(sock).startswith(b"HTTP/1.1 200")
        sock.sendall(GET[:10])
        assert read_to_the_end(sock).startswith(b"HTTP/1.1 408")


def test_pipelined_requests_are_answered_in_order(hasty: Any) -> None:
    with connect(hasty) as sock:
        sock.sendall(GET + HEAD % len(BODY) + BODY + GET.replace(b"Host", b"Connection: close\r\nHost"))
        answer = read_to_the_end(sock)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b'"status"') < answer.index(b'"choices"') < answer.rindex(b'"status"')


def test_an_oversized_header_is_refused(hasty: Any) -> None:
    with connect(hasty) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 6000)
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 431")
    assert error_of(answer) == "the request's header is larger than 4096 bytes"


@pytest.mark.parametrize(
    "garbage",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        HEAD.replace(b"%d", b"-5"),
        HEAD.replace(b"%d", b"5\r\nContent-Length: 6"),
        HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"zz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        bytes(range(256)) + b"\r\n\r\n",
    ],
)
def test_garbage_is_refused(hasty: Any, garbage: bytes) -> None:
    with connect(hasty) as sock:
        sock.sendall(garbage)
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 4")
    assert error_of(answer)
    assert httpx.get(f"{hasty.url}/health").status_code == 200


def test_an_endless_refused_body_is_cut_off(serving: Any, model: Any) -> None:
    with serving(model, body_s=0.4, body_bytes=1000) as served:
        with connect(served) as sock:
            sock.sendall(HEAD % 10**12)
            assert read_answer(sock).startswith(b"HTTP/1.1 413")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                dribble(sock, b"x" * 1000)


def test_a_client_that_stops_reading_is_cut_off(serving: Any, make_model: Any) -> None:
    fields = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 50_000,
        "stream": True,
        "ignore_eos": True,
        "n": 8,
    }
    body = json.dumps(fields | {"logprobs": 20}).encode()
    with serving(make_model(context=60_000), streams=8, stalled_write_s=0.3) as served:
        with connect(served) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(HEAD % len(body) + body)
            sock.recv(10)
            deadline = time.monotonic() + 40
            while served.engine.stats().running and time.monotonic() < deadline:
                time.sleep(0.02)
            assert served.engine.stats().running == 0


def test_stopping_does_not_wait_for_a_stalled_request(serving: Any, model: Any) -> None:
    """The graceful-shutdown limit is beyond the test's own: only closing the connections at once passes."""
    with serving(model, shutdown_s=1000, header_s=1000, body_s=1000) as served:
        header, body, idle = connect(served), connect(served), connect(served)
        header.sendall(GET[:10])
        body.sendall(HEAD % len(BODY) + BODY[:5])
        idle.sendall(GET)
        read_answer(idle)
    with header, body, idle:
        assert read_to_the_end(body).startswith(b"HTTP/1.1 503")


def test_stopping_lets_a_running_stream_finish(serving: Any, make_model: Any) -> None:
    fields = {"model": "tiny", "prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
    with serving(make_model(context=1000), shutdown_s=1000) as served:
        stack = httpx.Client()
        request = stack.build_request("POST", f"{served.url}/v1/completions", json=fields)
        response = stack.send(request, stream=True)
    text = response.read().decode()
    stack.close()
    assert text.endswith("data: [DONE]\n\n")


def test_a_thousand_deadlines_at_once_are_met_one_after_the_other() -> None:
    """So that no turn of the event loop closes them all; those that come alone are met at once."""
    spaced = Spaced()
    turns = [spaced.after(100.0) for _ in range(1000)]
    assert turns[0] == 100.0
    assert all(after - before == pytest.approx(EXPIRY_GAP_S) for before, after in pairwise(turns))
    assert spaced.after(turns[-1] + 5) == turns[-1] + 5
