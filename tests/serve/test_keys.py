"""Whose requests are taken, and how many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from muster.errors import MusterError, UsageError
from muster.serve.failures import RequestError
from muster.serve.gate import Front
from muster.serve.keys import ANYONE, VARIABLE, Client, Keys, read_keys
from muster.serve.rates import Rates
from muster.serve.server import bind
from muster.serve.talk import RemotePartner

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
FIELDS: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 4}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n\nalice: {ALICE} trusted\n  {BOB}\n")
    return path


def test_keys_of_a_file_and_the_environment(file: Path) -> None:
    keys = read_keys(file, {VARIABLE: "c:d-secret-0123456789,\nerin: erin-secret-0123456789"})
    assert keys.client_of(f"Bearer {ALICE}".encode()) == Client("alice", trusted=True)
    assert keys.client_of(f"bearer   {BOB} ".encode()) == Client("key-2", trusted=False)
    assert keys.client_of(b"Bearer c:d-secret-0123456789") == Client("key-3", trusted=False)
    assert keys.client_of(b"Bearer erin-secret-0123456789") == Client("erin", trusted=False)
    for wrong in (
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        ALICE.encode(),
        f"Basic {ALICE}".encode(),
        b"Bearer x\xff",
    ):
        assert keys.client_of(wrong) is None
    assert read_keys(None, {}).client_of(None) is ANYONE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("short", "line 1: a key of 5 characters can be guessed"),
        ("name with spaces: secret-0123456789", "write `key`, `name: key` or `name: key trusted`"),
        (f"a: {BOB}\nb: {BOB}", "line 2: this key or its name is there twice"),
        (f"a: {BOB}\na: {ALICE}", "line 2: this key or its name is there twice"),
        ("# nothing", "hold no key"),
        ("\xff" * 20, "write `key`"),
    ],
)
def test_unusable_key_files(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(UsageError, match=message) as refusal:
        read_keys(tmp_path / "keys", {})
    assert "secret" not in str(refusal.value)


def test_a_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none", {})


def test_only_keys_open_the_door(serving: Any, model: Any, file: Path, connect: Any) -> None:
    with serving(model, front=Front(keys=read_keys(file, {}))) as served:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nonsense"):
            refused = httpx.get(served.url + path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/health", "/health/ready"):
            assert httpx.get(served.url + path).status_code == 200
        guessed = httpx.post(
            f"{served.url}/v1/completions", json=FIELDS, headers={"Authorization": "Bearer x"}
        )
        assert guessed.json()["error"]["type"] == "authentication_error"
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ALICE[:-1], max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError, match="send a valid key"):
                wrong.completions.create(**FIELDS)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=BOB, max_retries=0) as bob:
            assert bob.completions.create(**FIELDS).choices
        assert served.engine.stats().generated_tokens <= 4


def test_a_refused_body_is_not_read(serving: Any, model: Any, file: Path) -> None:
    """Without a key not even its size is looked at, and the connection goes on."""
    with serving(model, front=Front(keys=read_keys(file, {})), body_bytes=1000) as served:
        with httpx.Client() as stack:
            headers = {"Content-Type": "application/json"}
            answer = stack.post(f"{served.url}/v1/completions", content=b"x" * 100_000, headers=headers)
            assert answer.status_code == 401
            assert stack.get(f"{served.url}/health").status_code == 200


def test_other_machines_reach_only_a_server_with_keys() -> None:
    with pytest.raises(UsageError, match="so whoever asks needs a key"):
        bind("0.0.0.0", 0)
    with bind("0.0.0.0", 0, guarded=True) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def test_a_conversation_takes_its_key_from_the_environment(
    serving: Any, model: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, front=Front(keys=read_keys(file, {}))) as served:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(MusterError, match="send a valid key"):
            RemotePartner(served.url)
        monkeypatch.setenv("OPENAI_API_KEY", BOB)
        assert RemotePartner(served.url).model_id == "tiny"


def test_requests_and_tokens_a_minute() -> None:
    now_s = [0.0]
    rates = Rates(requests_per_minute=60, tokens_per_minute=600, clock=lambda: now_s[0])
    for _ in range(60):
        rates.ask("a")
    with pytest.raises(RequestError, match="60 requests a minute and has used them; retry in 1 s") as refusal:
        rates.ask("a")
    assert (refusal.value.status, refusal.value.retry_after_s) == (429, 1)
    rates.ask("b")  # has buckets of its own
    now_s[0] = 1.0
    rates.ask("a")
    with pytest.raises(RequestError):
        rates.ask("a")
    rates.use("b", 900)  # an answer longer than what was left is paid back
    with pytest.raises(RequestError, match="600 tokens a minute and has used them; retry in 31 s"):
        rates.ask("b")
    now_s[0] = 32.0
    rates.ask("b")
    now_s[0] = 1e6
    for _ in range(60):  # no more than a minute's worth is saved
        rates.ask("a")
    with pytest.raises(RequestError):
        rates.ask("a")


def test_no_rate_is_no_limit() -> None:
    rates = Rates()
    for _ in range(1000):
        rates.ask("a")
        rates.use("a", 10**9)


def test_a_rate_is_answered_429_with_retry_after(serving: Any, model: Any) -> None:
    front = Front(
        keys=Keys([(BOB, Client("bob"))]), rates=Rates(requests_per_minute=1000, tokens_per_minute=5)
    )
    with serving(model, front=front) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=BOB, max_retries=0) as client:
            assert client.completions.create(**FIELDS).usage is not None  # 6 tokens
            with pytest.raises(openai.RateLimitError, match="5 tokens a minute") as refusal:
                client.completions.create(**FIELDS)
            assert int(refusal.value.response.headers["retry-after"]) > 10
            assert refusal.value.code == "rate_limit_exceeded"
            assert client.models.list().data  # asking costs nothing
