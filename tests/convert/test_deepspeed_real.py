"""What DeepSpeed itself wrote, converted by us and by DeepSpeed's own tools: the same bits.

DeepSpeed lives in an environment of its own, which `benchmarks/deepspeed_cpu.py` makes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muster.convert.opening import open_source
from muster.convert.source import KINDS
from muster.model.config_json import read_spec
from muster.model.families import FAMILIES
from tests.convert import deepspeed_peer
from tests.convert.writers import state_of

ENVIRONMENT = Path(os.environ.get("MUSTER_DEEPSPEED", Path(__file__).parents[2] / "build" / "deepspeed"))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (ENVIRONMENT / "bin" / "python").exists(), reason="benchmarks/deepspeed_cpu.py installs it"
    ),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("more", [["bf16"], ["fp32", "tied"]], ids=" ".join)
def test_the_same_bits(stage: int, more: list[str], tmp_path: Path) -> None:
    from muster.resilience.forked import free_port

    environment = {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(ENVIRONMENT / "extensions"),
        "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    peer = [str(Path(deepspeed_peer.__file__)), str(tmp_path), str(stage), *more]
    subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), *command, *peer], env=environment, check=True, timeout=280
    )
    spec = read_spec(tmp_path)
    theirs, reference = FAMILIES["llama"].tensors(spec), load_file(tmp_path / "zero_to_fp32.safetensors")
    own, universal = open_source(tmp_path), open_source(tmp_path / "universal")
    assert own.steps == universal.steps == deepspeed_peer.STEPS
    for kind in KINDS:
        value, other = own.values(kind, spec), universal.values(kind, spec)
        for name, like in state_of(spec)["weights"].items():
            tensor = value(name, like.shape)
            assert torch.equal(tensor, other(name, like.shape)), (kind, name)
            assert kind != "weights" or torch.equal(tensor, reference[theirs[name].name]), name
