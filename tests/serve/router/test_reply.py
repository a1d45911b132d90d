"""Answers as servers send them, however they are cut into pieces, and as they should not."""

from __future__ import annotations

import itertools

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.serve.router.reply import BadReply, Reply

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def read(pieces: list[bytes], method: str = "POST", *, closed: bool = False) -> tuple[Reply, bytes]:
    reply, body = Reply(method), b""
    for piece in pieces:
        reply.feed(piece)
        body += reply.take()
    if closed:
        reply.feed(b"")
    return reply, body


def chunked(parts: list[bytes], trailers: bytes = b"") -> bytes:
    framed = b"".join(b"%x;note\r\n%b\r\n" % (len(part), part) for part in parts if part)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n" + trailers + b"\r\n"


@given(
    parts=st.lists(st.binary(max_size=40), max_size=5),
    cuts=st.lists(st.integers(0, 400)),
    trailer=st.booleans(),
)
def test_any_cut_gives_the_same_answer_as_h11_reads(
    parts: list[bytes], cuts: list[int], trailer: bool
) -> None:
    body = b"".join(parts)
    plain = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    for raw in (plain, chunked(parts, b"a: b\r\n" * trailer), b"HTTP/1.1 100 Continue\r\n\r\n" + plain):
        places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
        reply, found = read([raw[one:two] for one, two in itertools.pairwise(places)])
        assert (found, reply.status, reply.ended, reply.reusable) == (body, 200, True, True)
        peer = h11.Connection(h11.CLIENT)
        peer.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
        peer.send(h11.EndOfMessage())
        peer.receive_data(raw)
        theirs = b""
        while not isinstance(event := peer.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                assert list(event.headers) == reply.headers
            elif isinstance(event, h11.Data):
                theirs += event.data
        assert theirs == body


def test_ends_that_no_length_tells() -> None:
    reply, body = read([HEAD + b"\r\nab", b"cd"], closed=True)
    assert (body, reply.ended, reply.reusable) == (b"abcd", True, False)
    reply, body = read([b"HTTP/1.1 204 No Content\r\n\r\n"])
    assert reply.ended
    reply, body = read([HEAD + b"content-length: 5\r\n\r\n"], method="HEAD")
    assert reply.ended
    for last in (
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
        HEAD + b"content-length: 0\r\nConnection: Close\r\n\r\n",
    ):
        reply, body = read([last])
        assert (reply.ended, reply.reusable) == (True, False)
    reply, body = read(
        [HEAD + b"content-length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n"]
    )  # an answer that nobody asked for
    assert (body, reply.ended, reply.reusable) == (b"x", True, False)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-x\r\n\r\n",
        HEAD,
        HEAD + b"content-length: 3\r\n\r\nab",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
        HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nx\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 5000,
        HEAD + b"folded:\r\n more\r\n\r\n",
        HEAD + b"bad name: x\r\n\r\n",
        HEAD + b"a: b\nc: d\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        HEAD + b"x: y\r\n" * 20_000,
    ],
)
def test_what_is_not_http_is_refused_in_one_piece_and_byte_by_byte(raw: bytes) -> None:
    for pieces in ([raw] if raw else [], [raw[place : place + 1] for place in range(min(len(raw), 6000))]):
        if len(raw) > 6000 and len(pieces) > 1:
            continue
        with pytest.raises(BadReply):
            read(pieces, closed=True)
