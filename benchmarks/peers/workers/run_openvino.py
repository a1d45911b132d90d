"""OpenVINO GenAI's continuous batching: `run_openvino.py FOLDER STREAMS PREFIX_CACHE THREADS`."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import numpy as np
import openvino
import openvino_genai
from lines import answer, now, serve


def main() -> None:
    folder, streams, caching, threads = sys.argv[1], *map(int, sys.argv[2:5])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GB
    scheduler.max_num_seqs = streams
    scheduler.enable_prefix_caching = bool(caching)
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )
    asked = 0

    def ask(prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        nonlocal asked
        config = openvino_genai.GenerationConfig(
            max_new_tokens=output_tokens, ignore_eos=True, do_sample=False
        )
        waiting = deque(range(len(prompts)))
        sent: dict[int, float] = {}
        arrived: list[list[float]] = [[] for _ in prompts]
        running: dict[int, Any] = {}

        def send() -> None:
            nonlocal asked
            number = waiting.popleft()
            sent[number] = now()
            ids = openvino.Tensor(np.array([prompts[number]], dtype=np.int64))
            running[number] = pipeline.add_request(asked, ids, config)
            asked += 1

        for _ in range(min(concurrency, len(prompts))):
            send()
        while running:
            pipeline.step()
            for number, handle in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        arrived[number] += [now()] * len(output.generated_ids)
                if len(arrived[number]) >= output_tokens:
                    del running[number]
                    if waiting:
                        send()
        return [answer(prompt, sent[i], arrived[i]) for i, prompt in enumerate(prompts)]

    serve(ask)


if __name__ == "__main__":
    main()
