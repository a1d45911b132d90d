"""`muster inspect` on folders made by hand, so that each can be damaged in its own way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from muster.checkpoint.manifest import FORMAT, Manifest, sum_file
from muster.checkpoint.sealed import seal
from muster.observe.records import RunLog
from tests.conftest import Muster


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "step-00000100")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "hf")


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    halves = [np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32)]
    for rank, half in enumerate(halves):
        tensors = {"weights.embed.weight": half, "optimizer.embed.weight.exp_avg": half}
        save_file(tensors, folder / f"rank-{rank:05d}.safetensors")
    Manifest(
        format=FORMAT,
        step=100,
        tokens=409_600,
        seed=0,
        digest="d" * 64,
        identity={},
        layout={"replicate": 1, "shard": 2, "zero": 1, "reason": "asked for"},
        model={"family": "llama"},
        versions={"torch": "2.13.0"},
        files={path.name: sum_file(path) for path in sorted(folder.iterdir())},
    ).write(folder)
    return folder


def make_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {"embed": np.zeros((8, 4), np.float16)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    record = {"provenance": {"step": 100}, "parity": {"top1": 1.0}, "sha256": sums}
    (folder / "muster.json").write_text(json.dumps(record))
    return folder


def make_run(folder: Path) -> Path:
    RunLog(folder).close()
    (folder / "run.json").write_text(json.dumps({"run": {}, "steps": 200}))
    make_checkpoint(folder / "checkpoints" / "step-00000100")
    make_export(folder / "hf")
    return folder


def test_a_checkpoint(muster: Muster, checkpoint: Path) -> None:
    code, out, _ = muster("inspect", checkpoint, "--verify", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["step"], facts["trained_tokens"]) == ("checkpoint", 100, 409_600)
    assert (facts["parameters"], facts["dtype"]) == (32, "F32")  # both shards, and no optimizer state
    assert facts["layout"] == "replicate 1, shard 2, zero 1"
    assert list(facts["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert facts["checksums"] == "all match"


def test_a_model_folder(muster: Muster, export: Path) -> None:
    code, out, _ = muster("inspect", export, "--verify", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["family"], facts["parameters"], facts["dtype"]) == ("llama", 32, "F16")
    assert (facts["context"], facts["vocabulary"], facts["parity"]) == (32, 8, {"top1": 1.0})


def test_a_run(muster: Muster, tmp_path: Path) -> None:
    code, out, _ = muster("inspect", make_run(tmp_path / "mine"), "--verify", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["name"], facts["state"], facts["steps"]) == ("run", "mine", "new", 200)
    assert [found["step"] for found in facts["checkpoints"]] == [100]
    assert facts["export"] == str(tmp_path / "mine" / "hf")


def test_text_for_people(muster: Muster, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine")
    for path in (folder, folder / "hf", folder / "checkpoints" / "step-00000100"):
        code, out, err = muster("inspect", path)
        assert (code, err) == (0, "")
        assert out.startswith("kind  ")
        assert "not checked (--verify does)" in out


@pytest.mark.parametrize(
    "where", ["checkpoints/step-00000100/rank-00001.safetensors", "hf/model.safetensors"]
)
def test_verify_finds_a_flipped_bit_and_names_the_file(muster: Muster, tmp_path: Path, where: str) -> None:
    folder = make_run(tmp_path / "mine")
    path = folder / where
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert muster("inspect", folder)[0] == 0
    for inspected in (folder, path.parent):
        code, out, err = muster("inspect", inspected, "--verify")
        assert (code, out) == (1, "")
        assert str(path) in err
        assert "SHA-256" in err


def test_verify_names_every_bad_file(muster: Muster, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine")
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    sums = {"tokenizer/tokenizer.json": sum_file(tokenizer).sha256}
    (folder / "run.json").write_bytes(seal({"run": {}, "steps": 200, "files": sums}))
    assert muster("inspect", folder, "--verify")[0] == 0
    shards = folder / "checkpoints" / "step-00000100"
    bad = [
        tokenizer,
        shards / "rank-00000.safetensors",
        shards / "rank-00001.safetensors",
        folder / "hf" / "config.json",
    ]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    (shards / "stray").write_text("")
    code, _, err = muster("inspect", folder, "--verify")
    assert code == 1
    assert "5 files are not sound" in err
    assert [line.split(" ")[1].rstrip(":") for line in err.strip().splitlines()[1:]] == [
        *map(str, bad[:3]),
        str(shards / "stray"),
        str(bad[3]),
    ]


def test_verify_finds_a_flipped_bit_in_a_record_of_sums(muster: Muster, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine")
    (folder / "run.json").write_bytes(seal({"run": {}, "steps": 200, "files": {}}))
    for path in (folder / "run.json", folder / "checkpoints" / "step-00000100" / "manifest.json"):
        honest = path.read_bytes()
        assert honest.count(b"00") >= 1
        path.write_bytes(honest.replace(b"00", b"01", 1))
        code, _, err = muster("inspect", folder, "--verify")
        assert code == 1
        assert f"{path} is damaged" in err
        path.write_bytes(honest)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 64, b"\x05\0\0\0\0\0\0\0[1,2]", b'\x08\0\0\0\0\0\0\0{"a": 1}']
)
def test_a_damaged_header(muster: Muster, export: Path, content: bytes) -> None:
    (export / "model.safetensors").write_bytes(content)
    code, _, err = muster("inspect", export)
    assert code == 1
    assert "model.safetensors is damaged" in err


@pytest.mark.parametrize("name", ["config.json", "muster.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_damaged_json(muster: Muster, export: Path, name: str, content: str) -> None:
    (export / name).write_text(content)
    code, _, err = muster("inspect", export)
    assert code == 2
    assert f"{export / name}" in err


def test_a_foreign_model_cannot_be_verified(muster: Muster, export: Path) -> None:
    (export / "muster.json").unlink()
    assert muster("inspect", export)[0] == 0
    code, _, err = muster("inspect", export, "--verify")
    assert code == 2
    assert "no muster.json" in err


@pytest.mark.parametrize("sums", [None, {}, {"../secret": "0"}, {"gone.bin": "0"}])
def test_checksums_that_cannot_be_checked(muster: Muster, export: Path, sums: object) -> None:
    (export / "muster.json").write_text(json.dumps({"sha256": sums}))
    assert muster("inspect", export, "--verify")[0] == 1


def test_what_is_nothing(muster: Muster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        code, _, err = muster("inspect", path)
        assert code == 2
        assert str(path) in err


def test_neither_runs_nor_inspect_imports_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    code = (
        "import sys; from muster.cli import main\n"
        "runs = sys.argv[1]\n"
        "for arguments in (['runs', '--runs', runs], ['inspect', runs + '/mine', '--verify']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended: assert not ended.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, timeout=60)
