from __future__ import annotations

import asyncio
import socket
from typing import Any

from muster.serve.server import bind


def test_a_short_answer_is_one_piece(served: Any) -> None:
    """Header, body and end in one call of the system: the client wakes up once."""
    with socket.create_connection(served.address, timeout=30) as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            head, _, body = sock.recv(1 << 16).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert body.endswith(b"}")


def test_small_pieces_of_an_answer_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm with a client's delayed ACK costs 40 ms between header and first token."""

    async def run() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            accepted.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as sock:
            async with await asyncio.start_server(connected, sock=sock):
                _, writer = await asyncio.open_connection(*sock.getsockname())
                try:
                    return await accepted
                finally:
                    writer.close()
                    await writer.wait_closed()

    assert asyncio.run(run()) != 0
