"""DeepSpeed's PipelineModule over transformers' own Llama layers, for `deepspeed_cpu.py`.

Runs in DeepSpeed's environment only: everything but the shared cells is imported by the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
from cells import Cell


def run(cell: Cell, steps: int, out: Path) -> None:
    """Its 1F1B engine, one stage a rank, parameters divided evenly."""
    import deepspeed
    import torch
    import transformers
    from deepspeed.pipe import PipelineModule

    torch.set_num_threads(cell.threads)
    transformers.utils.logging.set_verbosity_error()
    deepspeed.init_distributed(dist_backend="gloo")
    module = PipelineModule(
        layers=_layers(cell), num_stages=cell.processes, loss_fn=_loss, partition_method="parameters"
    )
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        config=engine_config(cell),
    )
    ends = []
    for step in range(cells.WARM_UP_STEPS + steps):
        engine.train_batch(data_iter=_microbatches(cell, step))
        ends.append(cells.now())
    cells.write(out, cell, ends)


def engine_config(cell: Cell) -> dict[str, Any]:
    """What every DeepSpeed engine here is told."""
    return {
        "train_micro_batch_size_per_gpu": cell.rows,
        "gradient_accumulation_steps": cell.microbatches,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }


def _microbatches(cell: Cell, step: int) -> Iterator[tuple[Any, Any]]:
    import numpy as np
    import torch

    for piece in np.split(cells.rows(cell, 0, step), cell.microbatches):
        yield torch.from_numpy(piece[:, :-1].copy()), torch.from_numpy(piece[:, 1:].copy())


def _loss(logits: Any, targets: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _layers(cell: Cell) -> list[Any]:
    """Embedding, decoder layers, last norm and head, each from hidden states to hidden states."""
    import torch
    from torch import Tensor, nn
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    config = cells.llama_config(cell)

    class Layer(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.inner = LlamaDecoderLayer(config, index)
            self.rotary = LlamaRotaryEmbedding(config)

        def forward(self, hidden: Tensor) -> Tensor:
            positions = torch.arange(hidden.shape[1])[None]
            out = self.inner(hidden, position_embeddings=self.rotary(hidden, positions))
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

    return [
        nn.Embedding(config.vocab_size, config.hidden_size),
        *(Layer(index) for index in range(config.num_hidden_layers)),
        LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
        nn.Linear(config.hidden_size, config.vocab_size, bias=False),
    ]
