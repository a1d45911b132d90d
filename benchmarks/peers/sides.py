"""All sides of the comparison, by name."""

from __future__ import annotations

from pathlib import Path

from peers.llamacpp import LlamaCpp
from peers.openvino_genai import OpenVino
from peers.ort_genai import OrtGenai
from peers.ours import OurEngine, Ours
from peers.side import Side
from peers.transformers_generate import Transformers


def all_sides(home: Path) -> dict[str, Side]:
    sides: list[Side] = [
        Ours(home), OurEngine(home), LlamaCpp(home), OpenVino(home), OrtGenai(home), Transformers(home)
    ]  # fmt: skip
    return {side.name: side for side in sides}
