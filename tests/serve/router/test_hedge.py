"""The second request for a stream that is slow to begin, with servers of all tempers behind a real router."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from muster.errors import UsageError
from muster.serve.router.hedge import ENOUGH, Hedging

BODY = {"model": "small-run", "prompt": "hedged", "max_tokens": 30, "stream": True}


def test_when() -> None:
    assert not Hedging().on
    assert Hedging("250ms").after_s == 0.25
    percentile = Hedging("p90")
    for number in range(ENOUGH):
        assert percentile.after_s is None  # for a percentile of nothing
        percentile.began(float(number))
    assert percentile.on
    assert percentile.after_s == ENOUGH * 0.9
    for wrong in ("soon", "p5", "95%"):
        with pytest.raises(UsageError, match="--hedge-after"):
            Hedging(wrong)


class Slow:
    """A server that says it is ready, and how it answers: after `pause_s`, with `status`, or not at all."""

    def __init__(self, text: str, pause_s: float = 0.0, status: int = 200, *, dies: bool = False) -> None:
        self.text, self.pause_s, self.status, self.dies = text, pause_s, status, dies
        self.asked = self.cut = 0
        self.seeds: list[int | None] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if head.startswith(b"get"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                self.asked += 1
                self.seeds.append(json.loads(body).get("seed"))
                gone = asyncio.ensure_future(reader.read(1))
                done, _ = await asyncio.wait([gone], timeout=self.pause_s)
                if done:
                    self.cut += 1
                    return
                gone.cancel()
                if self.dies:
                    return
                event = f'data: {{"text": "{self.text}"}}\n\ndata: [DONE]\n\n'.encode()
                writer.write(
                    b"HTTP/1.1 %d X\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b"
                    % (self.status, len(event), event)
                )
                return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def asked_through(
    servers: list[Slow], routing: Callable[..., Any], *options: str, **fields: Any
) -> list[str]:
    """Six answers, one after the other."""

    async def run() -> list[str]:
        listening = [await asyncio.start_server(one.answer, "127.0.0.1", 0) for one in servers]
        urls = [f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}" for one in listening]
        upstreams = [text for url in urls for text in ("--upstream", url)]
        answers = []

        def ask() -> None:
            with routing(*upstreams, "--policy", "round-robin", *options) as routed:
                routed.wait_ready(len(servers))
                for _ in range(6):
                    answers.append(
                        httpx.post(f"{routed.url}/v1/completions", json=BODY | fields, timeout=30).text
                    )
                counts.extend(routed.figure(f"{name}_total")[0] for name in ("hedges", "hedge_wins"))
                assert sum(routed.figure("replica_running_requests")) == 0
                assert sum(routed.figure("replica_outstanding_tokens")) == pytest.approx(0, abs=1e-6)

        counts: list[float] = []
        await asyncio.to_thread(ask)
        for one in listening:
            one.close()
        return [*answers, *map(str, counts)]

    return asyncio.run(run())


def test_the_first_token_wins_and_the_other_is_cut_off(routing: Any) -> None:
    slow, fast = Slow("slow", pause_s=20), Slow("fast")
    *answers, hedges, wins = asked_through([slow, fast], routing, "--hedge-after", "100ms", seed=7)
    assert all('"fast"' in answer for answer in answers)
    assert slow.asked == slow.cut == float(hedges) == float(wins)
    assert slow.asked >= 1
    assert fast.asked == 6


def test_what_has_no_seed_and_what_is_refused_is_not_won(routing: Any) -> None:
    """These servers' kind adds no seed, so that two of them would say different things."""
    slow, fast = Slow("slow", pause_s=0.4), Slow("fast")
    *answers, hedges, _ = asked_through([slow, fast], routing, "--hedge-after", "50ms")
    assert {'"slow"' in answer for answer in answers} == {True, False}
    assert (float(hedges), slow.cut) == (0, 0)
    for other in (Slow("busy", status=429), Slow("dead", dies=True)):
        slow = Slow("slow", pause_s=0.4)
        *answers, hedges, wins = asked_through([slow, other], routing, "--hedge-after", "50ms", seed=7)
        assert all('"slow"' in answer for answer in answers)
        assert float(hedges) >= 1
        assert float(wins) == 0


@pytest.mark.long
def test_a_replica_that_stands_still_is_not_waited_for(folder: Any, routing: Any) -> None:
    """SIGSTOP; the answers are those of an undisturbed run, seeds included."""
    with routing(folder, "--replicas", 2, "--dtype", "fp32", "--hedge-after", "300ms") as routed:
        routed.wait_ready(2)

        def ask(number: int) -> str:
            body = BODY | {"prompt": f"hedged {number}", "seed": number}
            events = httpx.post(f"{routed.url}/v1/completions", json=body, timeout=60).text.split("\n\n")
            return "".join(json.loads(one[6:])["choices"][0]["text"] for one in events if one[6:7] == "{")

        undisturbed = [ask(number) for number in range(8)]
        stopped = next(iter(routed.replicas().values()))
        stopped.send_signal(signal.SIGSTOP)
        assert [ask(number) for number in range(8)] == undisturbed
        assert routed.figure("hedge_wins_total")[0] >= 1
        stopped.send_signal(signal.SIGCONT)
        routed.wait_ready(2)
