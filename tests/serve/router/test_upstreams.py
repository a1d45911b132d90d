"""A router over servers that it did not start: one that is not muster, muster itself, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from muster.cli.serve import serve
from muster.errors import UsageError
from muster.serve.gate import Front
from muster.serve.keys import read_keys
from muster.serve.router.forward import DEATHS
from muster.serve.router.run import Router
from muster.serve.server import bind, url_of

Foreign = Callable[..., AbstractContextManager["Other"]]


class Other(ThreadingHTTPServer):
    """An OpenAI-compatible server of another kind: no health, no seeds, HTTP/1.0, and it may break off."""

    daemon_threads = True

    def __init__(
        self,
        *,
        words: int = 5,
        dies_after: int | None = None,
        status: int = 200,
        models: Sequence[str] = ("other",),
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = models
        self.words, self.dies_after, self.status = words, dies_after, status
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Other

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        cards = [{"id": name} for name in self.server.models]
        listed = {"/v1/models": {"data": cards}} | {f"/v1/models/{card['id']}": card for card in cards}
        self._answer(200 if self.path in listed else 404, listed.get(self.path, {}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(body)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.status != 200:
            self._answer(self.server.status, {"error": {"message": "no"}})
            return
        if not json.loads(body).get("stream"):
            self._answer(200, {"choices": [{"text": "w" * self.server.words}]})
            return
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(self.server.words):
            if number == self.server.dies_after:
                self.wfile.flush()
                self.connection.shutdown(2)
                return
            self._chunk(f'data: {{"choices": [{{"text": "{number}"}}]}}\n\n')
        self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def _answer(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def other() -> Foreign:
    @contextlib.contextmanager
    def run(**behaviour: Any) -> Iterator[Other]:
        with Other(**behaviour) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join()

    return run


@pytest.fixture
def route() -> Callable[..., AbstractContextManager[str]]:
    """`with route(URL, ...) as url`: a router in a thread, once all its servers are ready."""

    @contextlib.contextmanager
    def run(*urls: str, ready: int | None = None, front: Front | None = None) -> Iterator[str]:
        sock = bind("127.0.0.1", 0)
        url = url_of(sock)
        router = Router(sock, urls, "round-robin", front)
        thread = threading.Thread(target=router.run)
        thread.start()
        try:
            for _ in range(200):
                with contextlib.suppress(httpx.TransportError):
                    replicas = httpx.get(f"{url}/health").json()["replicas"]
                    if sum(one["ready"] for one in replicas) == (len(urls) if ready is None else ready):
                        break
                threading.Event().wait(0.05)
            yield url
        finally:
            router.stop()
            thread.join(30)
            assert not thread.is_alive()

    return run


def texts(content: bytes) -> list[str]:
    """The words of a stream, or its error."""
    parts = [part.removeprefix(b"data: ") for part in content.strip().split(b"\n\n")]
    chunks = [json.loads(part) for part in parts if part != b"[DONE]"]
    return [one["choices"][0]["text"] if "choices" in one else one["error"]["message"] for one in chunks]


BODY = {"model": "other", "prompt": "x", "stream": True}


def test_a_server_of_another_kind_gets_the_body_as_it_was_sent(other: Foreign, route: Any) -> None:
    with other() as server, route(server.url) as url:
        content = b'{"model": "other",  "prompt": "x", "stream": true, "unknown": [1e400, "\\ud800"]}'
        headers = {
            "Authorization": "Bearer secret",
            "X-Request-Id": "mine",
            "Content-Type": "application/json",
        }
        answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
        assert texts(answer.content) == ["0", "1", "2", "3", "4"]
        assert answer.headers["content-type"] == "text/event-stream"
        assert server.bodies == [content]
        assert server.headers[0]["authorization"] == "Bearer secret"
        assert server.headers[0]["x-request-id"] == answer.headers["x-request-id"] == "mine"
        whole = httpx.post(f"{url}/v1/completions?a=b", json=BODY | {"stream": False})
        assert whole.json()["choices"][0]["text"] == "wwwww"
        assert server.headers[1]["x-request-id"] == whole.headers["x-request-id"] != "mine"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "other"


def test_replicas_with_different_models_are_one_list(other: Foreign, route: Any) -> None:
    with other(models=("a", "b")) as one, other(models=("b", "c")) as two, route(one.url, two.url) as url:
        cards = httpx.get(f"{url}/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["a", "b", "c"]
        for name in ("a", "c", "a", "c"):
            assert httpx.get(f"{url}/v1/models/{name}").json() == {"id": name}
        assert httpx.get(f"{url}/v1/models/d").status_code == 404


def test_it_fails_over_before_the_first_token_and_says_so_after(other: Foreign, route: Any) -> None:
    with other(dies_after=0) as early, other(dies_after=2) as late, other() as sound:
        with route(early.url, sound.url) as url:
            for _ in range(4):
                assert texts(httpx.post(f"{url}/v1/completions", json=BODY).content) == [
                    "0",
                    "1",
                    "2",
                    "3",
                    "4",
                ]
            assert early.bodies
        with route(late.url) as url:
            said = texts(httpx.post(f"{url}/v1/completions", json=BODY).content)
            assert said[:2] == ["0", "1"]
            assert "cannot go on elsewhere" in said[-1]


def test_a_failure_is_tried_elsewhere_and_passed_on_where_there_is_nowhere(
    other: Foreign, route: Any
) -> None:
    with other(status=500) as broken, other(status=429) as full, other() as sound:
        with route(broken.url, full.url, sound.url) as url:
            for _ in range(6):
                assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
        with route(full.url) as url:
            assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 429


def test_a_request_that_kills_is_not_sent_to_all(other: Foreign, route: Any) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(other(dies_after=0)) for _ in range(DEATHS + 2)]
        with route(*(server.url for server in servers)) as url:
            answer = httpx.post(f"{url}/v1/completions", json=BODY)
            assert answer.status_code == 502
            assert f"{DEATHS} replicas died" in answer.json()["error"]["message"]
        assert sum(len(server.bodies) for server in servers) == DEATHS


def test_keys_are_asked_for_here_and_passed_on(other: Foreign, route: Any) -> None:
    key = "0123456789abcdef"
    front = Front(keys=read_keys(None, {"MUSTER_KEYS": key}))
    with other() as server, route(server.url, front=front) as url:
        for headers in ({}, {"Authorization": "Bearer other-key-other"}):
            assert httpx.post(f"{url}/v1/completions", json=BODY, headers=headers).status_code == 401
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert not server.bodies
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=headers)
        assert texts(answer.content) == ["0", "1", "2", "3", "4"]
        assert len(answer.headers.get_list("x-request-id")) == 1
        assert server.headers[0]["authorization"] == f"Bearer {key}"


def test_a_server_that_is_not_there_is_left_out(other: Foreign, route: Any) -> None:
    with other() as gone:
        pass
    with other() as sound, route(gone.url, sound.url, ready=1) as url:
        for _ in range(4):
            assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
        assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}


def test_an_adapter_is_asked_for_where_there_is_one(
    model: Any, serving: Any, served: Any, route: Any
) -> None:
    """And a model that nobody has is refused by whoever is asked."""
    body = {"prompt": "x", "max_tokens": 2}
    with serving(model, adapters=("mine",)) as other, route(served.url, other.url) as url:
        before = other.engine.stats().steps
        for _ in range(6):
            answer = httpx.post(f"{url}/v1/completions", json=body | {"model": "mine"})
            assert (answer.status_code, answer.json()["model"]) == (200, "mine")
        assert other.engine.stats().steps - before >= 6
        assert httpx.post(f"{url}/v1/completions", json=body | {"model": "nobody's"}).status_code == 404


def test_muster_answers_through_a_router_as_it_does_itself(served: Any, route: Any) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3, "max_tokens": 20}
    with route(served.url) as url, route(url) as second:
        direct = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"]
        for through in (url, second):
            assert httpx.post(f"{through}/v1/chat/completions", json=body).json()["choices"] == direct
            answer = httpx.post(f"{through}/v1/chat/completions", json=body | {"stream": True})
            assert b": relay" not in answer.content
            parts = [part for part in answer.content.split(b"\n\n") if part.startswith(b"data: {")]
            deltas = [json.loads(part[6:])["choices"][0]["delta"] for part in parts]
            assert "".join(one.get("content", "") for one in deltas) == direct[0]["message"]["content"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (None, {}, "nothing to serve"),
        (None, {"upstream": ["example"]}, "no address of a server"),
        (None, {"upstream": ["http://h:1", "http://h:1/v1"], "port": 0}, "given twice"),
        ("folder", {"upstream": ["http://h:1"]}, "leave PATH and --replicas out"),
        ("folder", {"replicas": 0}, "--replicas 0 should be at least 1"),
        (None, {"replicas": 2}, "nothing to serve"),
    ],
)
def test_usage_errors(folder: Any, path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve(folder if path else None, **options)
