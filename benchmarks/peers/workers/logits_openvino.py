"""Logits of a converted model: `logits_openvino.py FOLDER IDS OUT`, token ids (B, T) and logits (B, T, V) as .npy."""

from __future__ import annotations

import sys

import numpy as np
import openvino


def main() -> None:
    folder, ids, out = sys.argv[1:4]
    request = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU").create_infer_request()
    found = []
    for chunk in np.load(ids):
        request.reset_state()
        positions = np.arange(len(chunk))[None]
        inputs = {
            "input_ids": chunk[None], "attention_mask": np.ones_like(positions), "position_ids": positions,
            "beam_idx": np.zeros(1, dtype=np.int32),
        }  # fmt: skip
        found.append(np.array(request.infer(inputs)["logits"][0], dtype=np.float32))
    np.save(out, np.stack(found))


if __name__ == "__main__":
    main()
