"""Trains a small Llama under DeepSpeed on CPU ranks and saves it as DeepSpeed does; run by its own Python.

    python -m torch.distributed.run --nproc-per-node 2 deepspeed_peer.py FOLDER STAGE PRECISION [tied]

Beside its checkpoint it leaves what DeepSpeed itself makes of it: `zero_to_fp32.safetensors`, and `universal/`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEPS = 3


def main(folder: Path, stage: int, precision: str, tied: bool) -> None:
    import deepspeed
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    deepspeed.init_distributed(dist_backend="gloo")
    config = transformers.LlamaConfig(
        vocab_size=263, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "sub_group_size": 2_000} if stage == 3 else {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=settings
    )
    rank = int(os.environ["RANK"])
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(0, 263, (2, 16), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder))
    engine.destroy()
    if rank:
        return
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    config.save_pretrained(folder)
    whole = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in whole.items()},
        folder / "zero_to_fp32.safetensors",
    )
    tag = (folder / "latest").read_text()
    more = [] if stage == 3 else ["--inject_missing_state"]
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / tag),
         "--output_folder", str(folder / "universal"), "--num_extract_workers", "1", "--num_merge_workers", "1",
         *more],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "tied" in sys.argv)
