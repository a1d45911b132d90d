"""llama.cpp's servers behind the router, where `benchmarks/serve_cpu.py --setup` has built them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

PEERS = Path(__file__).parents[3] / "build" / "peers"
SERVER = PEERS / "llama.cpp" / "build" / "bin" / "llama-server"
MODEL = PEERS / "models" / "tiny" / "llama.cpp" / "bf16.gguf"


@pytest.mark.long
@pytest.mark.skipif(not (SERVER.is_file() and MODEL.is_file()), reason="llama.cpp's server is not built")
def test_llama_cpp_streams_through_the_router_and_a_dead_one_is_left_out(routing: Any) -> None:
    with contextlib.ExitStack() as stack:
        servers, urls = [], []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as sock:
                port = sock.getsockname()[1]
            command = [
                SERVER,
                "-m",
                MODEL,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "-c",
                "256",
                "-np",
                "2",
            ]
            servers.append(
                stack.enter_context(subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL))
            )
            stack.callback(servers[-1].kill)
            urls.append(f"http://127.0.0.1:{port}")
        with routing("--upstream", urls[0], "--upstream", urls[1], "--policy", "round-robin") as routed:
            routed.wait_ready(2)
            body = {"model": "any", "prompt": "once upon", "max_tokens": 12, "temperature": 0}
            whole = httpx.post(f"{routed.url}/v1/completions", json=body, timeout=60).json()
            answer = httpx.post(f"{routed.url}/v1/completions", json=body | {"stream": True}, timeout=60)
            parts = [part[6:] for part in answer.content.split(b"\n\n") if part.startswith(b"data: {")]
            streamed = "".join(json.loads(part)["choices"][0]["text"] for part in parts)
            assert streamed == whole["choices"][0]["text"]
            servers[0].kill()
            for _ in range(6):
                again = httpx.post(f"{routed.url}/v1/completions", json=body, timeout=60)
                assert again.json()["choices"][0]["text"] == streamed
            routed.wait_ready(1)
