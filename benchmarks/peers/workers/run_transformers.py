"""transformers' `generate` in bf16: `run_transformers.py FOLDER THREADS`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from lines import answer, now, serve


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Called after each token of the batch; stops nothing."""

    def __init__(self) -> None:
        self.arrived_s: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.arrived_s.append(now())
        return torch.zeros(len(ids), dtype=torch.bool)


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)

    @torch.inference_mode()
    def ask(prompts: list[list[int]], output_tokens: int, concurrency: int) -> list[dict[str, Any]]:
        answers = []
        for first in range(0, len(prompts), concurrency):
            batch = torch.tensor(prompts[first : first + concurrency])
            clock, sent_s = Clock(), now()
            model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=output_tokens,
                min_new_tokens=output_tokens, stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )  # fmt: skip
            answers += [answer(prompt, sent_s, clock.arrived_s) for prompt in batch.tolist()]
        return answers

    serve(ask)


if __name__ == "__main__":
    main()
