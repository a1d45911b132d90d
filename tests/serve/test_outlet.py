"""Streams on the wire: clients of HTTP/1.0, clients that are behind, and crowds that are refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from muster.model.transformer import Transformer


def ask(version: str = "1.1", **fields: Any) -> bytes:
    body = json.dumps(
        {"model": "tiny", "prompt": "ab", "temperature": 0, "ignore_eos": True} | fields
    ).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def read(sock: socket.socket) -> tuple[bytes, bytes]:
    """An answer's header and body, to the end."""
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def frames(body: bytes) -> list[bytes]:
    """Of chunked transfer coding."""
    found = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        assert body[length : length + 2] == b"\r\n"
        if length == 0:
            return found
        found.append(body[:length])
        body = body[length + 2 :]


def texts(events: bytes) -> dict[int, str]:
    """The text of each choice."""
    *lines, done, rest = events.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    found: dict[int, str] = {}
    for line in lines:
        for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


def test_a_stream_is_the_same_in_http_1_0(served: Any) -> None:
    heard = []
    for version in ("1.0", "1.1"):
        with socket.create_connection(served.address, timeout=30) as sock:
            sock.sendall(ask(version, stream=True, max_tokens=20))
            head, body = read(sock)
        chunked = b"chunked" in head.lower()
        assert chunked == (version == "1.1")
        heard.append(texts(b"".join(frames(body)) if chunked else body))
    assert heard[0] == heard[1]


def test_a_client_that_is_behind_misses_nothing(serving: Any, make_model: Callable[..., Transformer]) -> None:
    fields = {"max_tokens": 400, "n": 8, "seed": 5, "temperature": 1}
    with serving(make_model(context=500, layers=1), streams=8) as served, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect(served.address)
        deadline = time.monotonic() + 60
        while not (connections := list(served.server.server_state.connections)):
            assert time.monotonic() < deadline
        accepted = connections[0].transport.get_extra_info("socket")
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # or megabytes would fit in between
        sock.sendall(ask(stream=True, **fields))
        while (stats := served.engine.stats()).generated_tokens < 8 * 400 or stats.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pieces = frames(read(sock)[1])
        whole = httpx.post(
            f"{served.url}/v1/completions", content=ask(**fields).partition(b"\r\n\r\n")[2],
            headers={"Content-Type": "application/json"}, timeout=60,
        ).json()  # fmt: skip
    assert texts(b"".join(pieces)) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    most = max(piece.count(b"data: ") for piece in pieces)
    assert most > 20, "what came while it was behind comes at once"


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings"])
def test_a_crowd_is_refused_before_it_has_sent_its_bodies(
    serving: Any, model: Transformer, path: str
) -> None:
    with serving(model, waiting_limit=0) as served:
        with socket.create_connection(served.address, timeout=5) as sock:
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())
            answer = sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: 1\r\n" in answer.lower()
        tokens = httpx.post(f"{served.url}/tokenize", json={"model": "tiny", "prompt": "ab"})
        assert tokens.status_code == 200, "which waits for nobody"
