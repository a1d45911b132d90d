from __future__ import annotations

import asyncio
import socket

from muster.serve.server import bind


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
