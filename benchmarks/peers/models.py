"""The models of the comparison: Llama shapes with random weights, as folders in Hugging Face layout."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import tokenizers
import torch
from serve_kernels_cpu import SHAPES
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from muster.data.tokenizer import SEPARATOR, Tokenizer
from muster.model.folder import write_files
from muster.model.spec import TransformerSpec
from muster.model.staging import staged
from muster.model.transformer import materialize

TINY = TransformerSpec(
    family="llama", layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512, context=256, tied=False,
)  # fmt: skip
"""For tests of the benchmark itself."""


def spec_of(shape: str) -> TransformerSpec:
    return TINY if shape == "tiny" else SHAPES[shape]


def model_folder(shape: str, root: Path) -> Path:
    """The folder of a shape's weights, written if it is not there: the same bits every time."""
    folder = root / shape / "hf"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        spec = spec_of(shape)
        tokenizer = words(spec.vocab)
        chance = torch.Generator().manual_seed(0)

        def random(name: str, size: torch.Size) -> torch.Tensor:
            return torch.ones(size) if "norm" in name else torch.randn(size, generator=chance) * 0.02

        model = materialize(spec, random, dtype=torch.bfloat16)
        with staged(folder) as draft:
            write_files(
                model.state_dict(), spec, draft, dtype=torch.bfloat16, bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
            )  # fmt: skip
            tokenizer.save(draft)
    return folder


def words(vocab: int) -> Tokenizer:
    """A byte-level BPE whose tokens are the bytes, the separator and made-up words: whichever token a random model
    generates, its text is whole and not empty, so that every server sends one piece of text for each token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    made_up = ("Ġ" + "".join(word) for word in letters)
    tokens = [*alphabet, "Ġa", *itertools.islice(made_up, vocab - len(alphabet) - 2)]
    ids = {token: id for id, token in enumerate(tokens)}
    # One merge, as some readers of such files want any.
    inner = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return Tokenizer(inner, SEPARATOR, SEPARATOR)
