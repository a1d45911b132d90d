"""What whoever runs a server sees of it: readiness, metrics, the access log, TLS, and its end."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from muster.errors import UsageError
from muster.serve.gate import Front
from muster.serve.keys import Client, Keys
from muster.serve.metrics import Histogram, Metrics
from muster.serve.protocol import Stats
from muster.serve.tls import tls_context
from muster.serve.visit import AccessLog

KEY = "secret-0123456789"
FIELDS: dict[str, Any] = {"model": "tiny", "prompt": "hush", "max_tokens": 5, "ignore_eos": True}


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Name and label values but the model's: value, as Prometheus' own parser reads them."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("gauge", "counter", "histogram"), family.name
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            found[(sample.name.removeprefix("muster:"), *labels.values())] = sample.value
    return found


def test_metrics_are_what_prometheus_reads() -> None:
    metrics = Metrics()
    for value in (0.0005, 0.001, 0.3, 1e9):
        metrics.ttft.observe(value)
    metrics.finished["stop"] += 2
    metrics.responses[429] += 3
    stats = Stats(running=2, waiting=1, blocks=8, used_blocks=2, prefix_query_tokens=9, prefix_hit_tokens=4)
    found = samples(metrics.render(stats, 'a "quoted" \\ name'))
    assert found["num_requests_running",] == 2
    assert found["num_requests_waiting",] == 1
    assert found["kv_cache_usage_perc",] == 0.25
    assert (found["prefix_cache_queries_total",], found["prefix_cache_hits_total",]) == (9, 4)
    assert found["request_success_total", "stop"] == 2
    assert found["http_responses_total", "429"] == 3
    assert found["time_to_first_token_seconds_bucket", "0.001"] == 2  # a bound belongs to its bucket
    assert found["time_to_first_token_seconds_bucket", "0.5"] == 3
    assert (
        found["time_to_first_token_seconds_bucket", "+Inf"]
        == found["time_to_first_token_seconds_count",]
        == 4
    )
    assert found["time_to_first_token_seconds_sum",] == pytest.approx(1e9)
    assert samples(Metrics().render(Stats(), "m"))["kv_cache_usage_perc",] == 0
    assert next(Histogram((1,)).lines("x", "l")) == 'x_bucket{l,le="1"} 0'


def test_metrics_count_what_happens(serving: Any, model: Any) -> None:
    with serving(model) as served:

        def scrape() -> dict[tuple[str, ...], float]:
            answer = httpx.get(f"{served.url}/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            return samples(answer.text)

        assert scrape()["generation_tokens_total",] == 0
        for _ in range(2):
            httpx.post(f"{served.url}/v1/completions", json=FIELDS | {"n": 2})
        httpx.post(f"{served.url}/v1/completions", json=FIELDS | {"stream": True})
        httpx.post(f"{served.url}/v1/completions", json={})
        found = scrape()
        assert found["generation_tokens_total",] == 25
        assert found["request_success_total", "length"] == 5
        assert found["time_to_first_token_seconds_count",] == 5
        assert found["inter_token_latency_seconds_count",] <= 20
        assert found["e2e_request_latency_seconds_count",] == 3
        assert (found["http_responses_total", "200"], found["http_responses_total", "400"]) == (4, 1)
        assert found["prefix_cache_hits_total",] > 0
        assert found["num_requests_running",] == found["num_requests_waiting",] == 0


def test_a_server_is_ready_after_its_warm_up(serving: Any, model: Any) -> None:
    warmed = threading.Event()

    async def warm_up() -> None:
        await asyncio.to_thread(warmed.wait)

    with serving(model, warm_up=warm_up, wait=False) as served:
        while True:
            try:
                answer = httpx.get(f"{served.url}/health/ready")
                break
            except httpx.ConnectError:
                continue
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        assert httpx.get(f"{served.url}/health").status_code == 200
        warmed.set()
        while httpx.get(f"{served.url}/health/ready").status_code != 200:
            pass


def test_draining_finishes_what_runs_and_refuses_what_is_new(serving: Any, make_model: Any) -> None:
    long = {"model": "tiny", "prompt": "a", "max_tokens": 600, "stream": True, "ignore_eos": True}
    with serving(make_model(context=1000), shutdown_s=1000) as served:
        with httpx.Client() as stack, httpx.Client() as other:
            with stack.stream("POST", f"{served.url}/v1/completions", json=long) as stream:
                arriving = stream.iter_lines()
                next(arriving)
                served.server.should_exit = True
                while (ready := other.get(f"{served.url}/health/ready")).status_code == 200:
                    pass
                assert ready.json() == {"status": "draining"}
                refused = other.post(f"{served.url}/v1/completions", json=long)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert "the server is stopping" in refused.text
                assert other.get(f"{served.url}/health").status_code == 200
                lines = [line for line in arriving if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_the_access_log_has_figures_and_no_secrets(serving: Any, model: Any) -> None:
    file = io.BytesIO()
    front = Front(keys=Keys([(KEY, Client("bob"))]), log=AccessLog(file))
    with serving(model, front=front) as served:
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}
        url = f"{served.url}/v1/completions"
        assert httpx.post(url, json=FIELDS, headers=headers).headers["x-request-id"] == "mine-1"
        forged = headers | {"X-Request-Id": 'x"\x7f; drop'}
        answer = httpx.post(url + "?key=" + KEY, json=FIELDS | {"stream": True}, headers=forged)
        assert answer.headers["x-request-id"] != forged["X-Request-Id"]
        assert httpx.post(url, json=FIELDS).status_code == 401
        httpx.get(f"{served.url}/health")
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 401]
    assert [line["client"] for line in lines] == ["bob", "bob", ""]
    assert [line["output_tokens"] for line in lines] == [5, 5, 0]
    assert lines[0]["request_id"] == "mine-1"
    assert lines[1]["request_id"] == answer.headers["x-request-id"]
    assert lines[0]["prompt_tokens"] == 4
    assert 0 < lines[0]["ttft_seconds"] <= lines[0]["seconds"]
    assert "ttft_seconds" not in lines[2]
    assert KEY.encode() not in file.getvalue()
    assert b"hush" not in file.getvalue()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return cert, key


def test_https(serving: Any, model: Any, certificate: tuple[Path, Path]) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    with serving(model, tls=tls_context(*certificate), header_s=0.5) as served:
        assert served.url.startswith("https://")
        with httpx.Client(verify=trusting) as stack:
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=stack) as client:
                assert client.completions.create(
                    **{k: v for k, v in FIELDS.items() if k != "ignore_eos"}
                ).usage
        with socket.create_connection(served.address, timeout=20) as silent:
            assert silent.recv(100) == b""  # a handshake that is never begun has the header's deadline


def test_unusable_certificates(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    assert tls_context(None, None) is None
    wrong, sealed, both = (tmp_path / name for name in ("wrong.pem", "sealed.pem", "both.pem"))
    subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-out", wrong], check=True)
    subprocess.run(["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", key, "-out", sealed],
                   check=True, capture_output=True)  # fmt: skip
    both.write_text(cert.read_text() + key.read_text())
    assert tls_context(both, None) is not None
    for files, message in (
        ((None, key), "--tls-key needs the certificate"),
        ((cert, tmp_path / "none"), "none cannot be read: No such file"),
        ((cert, wrong), "the key is not the certificate's"),
        ((cert, sealed), "is encrypted: use one without a password"),
        ((cert, None), "certificate chain and its private key in PEM"),
        ((key, key), "certificate chain and its private key in PEM"),
    ):
        with pytest.raises(UsageError, match=message):
            tls_context(*files)
