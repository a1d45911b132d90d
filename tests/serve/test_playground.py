"""The page at `/`: what every browser is told of it, and a real one where there is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from muster.data.tokenizer import Tokenizer
from muster.serve.codec import TextCodec
from muster.serve.crossing import Stream
from muster.serve.gate import Front
from muster.serve.http import build_app
from muster.serve.keys import Client, Keys
from muster.serve.limits import Limits
from muster.serve.protocol import FinishReason, Request, Stats, Token
from muster.serve.router.app import build_app as build_router
from muster.serve.router.fleet import Fleet, Replica
from muster.serve.server import Server, bind, url_of

from .browser import FOUND, Page, browsing

KEY = "playground-secret-0123456789"
MARKUP = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & more"

needs_browser = pytest.mark.skipif(FOUND is None, reason="no Chromium on this machine")


class Parrot:
    """An engine that says what it is told to."""

    def __init__(self, says: str) -> None:
        self._ids = Tokenizer.byte().encode(says)

    def submit(self, request: Request) -> Stream:
        stream = Stream(request)
        reasons: list[FinishReason | None] = [*[None] * (len(self._ids) - 1), "length"]
        tokens = [Token(id=id, finish_reason=reason) for id, reason in zip(self._ids, reasons, strict=True)]
        stream.loop.call_soon(stream.put, tokens)
        return stream

    def check(self) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> Stats:
        return Stats()


@contextmanager
def listening(app: Any, front: Front) -> Iterator[str]:
    limits, ready, sock = Limits(context_tokens=0), threading.Event(), bind("127.0.0.1", 0)
    url = url_of(sock)
    server = Server(app, limits, on_ready=ready.set, front=front)
    thread = threading.Thread(target=server.serve_on, args=(sock,))
    thread.start()
    try:
        assert ready.wait(30)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)


def a_server(front: Front) -> Any:
    tokenizer = Tokenizer.byte()
    codec = TextCodec(tokenizer=tokenizer, eos_ids=frozenset({tokenizer.eos_id}))
    return build_app(Parrot(MARKUP), codec, "parrot", Limits(context_tokens=4000), front)


def a_router(front: Front) -> Any:
    return build_router(Fleet([Replica(0, "0")], "prefix"), front, body_bytes=1 << 20)


@pytest.mark.parametrize("make", [a_server, a_router])
def test_the_page_needs_no_key_and_opens_nothing_else(make: Callable[[Front], Any]) -> None:
    front = Front(keys=Keys([(KEY, Client("a"))]))
    with listening(make(front), front) as url:
        page = httpx.get(url)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(one.split(" ", 1) for one in page.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert "unsafe" not in page.headers["content-security-policy"]
        assert policy["script-src"].startswith("'sha256-")
        assert policy["frame-ancestors"] == "'none'"
        assert "://" not in page.text, "it asks nobody else"
        for asked in (httpx.post(url, json={}), httpx.get(f"{url}/v1/models"), httpx.request("DELETE", url)):
            assert asked.status_code == 401


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


def ask(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('said').focus()")
    page.type(text)
    page.press("Enter", "\r", 13)


@needs_browser
def test_an_answer_with_markup_stays_text_and_a_key_stays_in_its_field(page: Page) -> None:
    front = Front(keys=Keys([(KEY, Client("a"))]))
    with listening(a_server(front), front) as url:
        page.open(url)
        page.wait("document.getElementById('status').textContent === 'This server needs a key.'")
        page.evaluate("document.getElementById('key').focus()")
        page.type(KEY)
        page.press("Tab", "", 9)
        page.wait("document.getElementById('model').value === 'parrot'")
        ask(page, f"say {MARKUP}")
        page.wait("document.querySelector('.assistant small').textContent.includes('tokens/s')")
        assert page.evaluate("document.querySelector('.assistant p').textContent") == MARKUP
        assert page.evaluate("document.querySelector('.user p').textContent") == f"say {MARKUP}"
        assert page.evaluate("document.querySelectorAll('#talk script, #talk img').length") == 0
        assert page.evaluate("document.title") == "muster playground"
        figures = page.evaluate("document.querySelector('.assistant small').textContent")
        assert f"{len(MARKUP)} tokens of answer" in figures
        assert "first token after" in figures
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert page.evaluate(kept) == f'[{{}},{{}},"","{url}/"]'
        with pytest.raises(AssertionError, match="TrustedHTML"):  # what a mistake of ours would meet
            page.evaluate("document.body.innerHTML = 'x'")
        assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
        page.console.clear()


@needs_browser
def test_stop_ends_the_work_at_the_server(page: Page, make_model: Any, serving: Any) -> None:
    with serving(make_model(context=4000)) as served:
        page.open(served.url)
        page.wait("document.getElementById('model').value === 'tiny'")
        page.evaluate("document.getElementById('most').value = 3000")
        page.evaluate("document.getElementById('temperature').value = 0")  # whose answer never ends by itself
        ask(page, "go on")
        page.wait("document.querySelector('.assistant p')?.textContent.length > 20")
        assert served.engine.stats().running == 1
        assert page.evaluate("document.getElementById('talk').ariaBusy") == "true"
        page.press("Escape", "", 27)
        page.wait("document.querySelector('.assistant small').textContent.includes('stopped')")
        page.wait("document.activeElement.id === 'said'")
        generated = served.engine.stats().generated_tokens
        deadline = threading.Event()
        for _ in range(100):
            if served.engine.stats().running == 0:
                break
            deadline.wait(0.1)
        assert served.engine.stats().running == 0
        assert generated < 3000
        ask(page, "x" * 5000)  # more than fits: the server's words are shown
        page.wait("document.querySelector('.wrong p')?.textContent.includes('context')")
        unlabelled = (
            "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length)"
        )
        assert page.evaluate(f"{unlabelled}.length") == 0
        assert not [line for line in page.console if '"level": "error"' in line and "400" not in line]
