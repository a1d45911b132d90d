"""Our engine's own loop, without a process boundary, HTTP or text: `run_engine.py FOLDER FORMAT STREAMS CONTEXT`."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lines import answer, now, serve

from muster.model.config_json import read_spec
from muster.serve.opening import Setup, build_core, choose_threads
from muster.serve.protocol import Request, SamplingParams, Token


def main() -> None:
    folder, format, streams, context = sys.argv[1:5]
    spec = read_spec(Path(folder))
    threads, _ = choose_threads(spec.parameters())
    torch.set_num_threads(threads)
    core = build_core(
        Setup(
            folder=folder,
            dtype=format,
            streams=int(streams),
            context_tokens=int(context),
            vocab=spec.vocab,
            threads=threads,
        )
    )

    def ask(prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        waiting = deque(enumerate(prompts))
        sent: dict[int, float] = {}
        arrived: list[list[float]] = [[] for _ in prompts]

        def send() -> None:
            number, prompt = waiting.popleft()
            sent[number] = now()
            params = SamplingParams(max_tokens=output_tokens, temperature=0.0)
            core.add(Request(id=str(number), prompt=prompt, params=params))

        for _ in range(min(concurrency, len(prompts))):
            send()
        while core.busy:
            for id, token in core.step().items:
                if not isinstance(token, Token):
                    raise token
                arrived[int(id)].append(now())
                if token.finish_reason is not None and waiting:
                    send()
        return [answer(prompt, sent[i], arrived[i]) for i, prompt in enumerate(prompts)]

    serve(ask)


if __name__ == "__main__":
    main()
