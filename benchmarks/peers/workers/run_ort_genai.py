"""ONNX Runtime GenAI's generator: `run_ort_genai.py FOLDER THREADS`."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai
from lines import answer, now, serve


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    config = onnxruntime_genai.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = onnxruntime_genai.Model(config)

    def ask(prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        answers = []
        for first in range(0, len(prompts), concurrency):
            batch = prompts[first : first + concurrency]
            sent_s = now()
            params = onnxruntime_genai.GeneratorParams(model)
            length = len(batch[0]) + output_tokens
            params.set_search_options(
                max_length=length, min_length=length, batch_size=len(batch), do_sample=False
            )
            generator = onnxruntime_genai.Generator(model, params)
            generator.append_tokens(np.array(batch, dtype=np.int32))
            arrived_s = []
            for _ in range(output_tokens):
                generator.generate_next_token()
                arrived_s.append(now())
            answers += [answer(prompt, sent_s, arrived_s) for prompt in batch]
        return answers

    serve(ask)


if __name__ == "__main__":
    main()
