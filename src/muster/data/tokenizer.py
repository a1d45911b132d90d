"""Text to token ids and back, around the `tokenizers` library: trained, loaded from tokenizer.json, or bytes.

Text is text: a document that happens to contain `<|endoftext|>` encodes to the tokens of those
13 characters and never to the special token, because neither a corpus nor a prompt from the network may
end a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from muster.data.files import write_atomic
from muster.errors import DataError

SEPARATOR = "<|endoftext|>"

# The pre-tokenizer pattern of Llama 3: words keep one leading space, numbers fall into groups of three
# digits, runs of line breaks and of indentation stay whole.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Beginning and end of a text where no tokenizer_config.json names them.
_WELL_KNOWN = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    (SEPARATOR, SEPARATOR),
    ("<|im_end|>", "<|im_end|>"),
)

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """A `tokenizers.Tokenizer` with its beginning and end of text."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        bos: str,
        eos: str,
        *,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        # Files from elsewhere may carry the truncation and padding of their training script.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner, self._config, self._chat_template = inner, config or {}, chat_template
        self.bos, self.eos = bos, eos
        self.bos_id, self.eos_id = _id_of(inner, bos), _id_of(inner, eos)
        self.vocab = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id, which is what an embedding must have rows for."""
        self.dtype: np.dtype[Any] = np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")
        """What the ids are stored as."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids of each text as `dtype`, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; special tokens leave nothing."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def longest(self) -> int | None:
        """Characters that one token stands for at most; None where that is not known (one may stand for any word)."""
        parts = json.loads(self._inner.to_str())
        model, kinds = parts["model"], json.dumps([parts["pre_tokenizer"], parts["normalizer"]])
        if model.get("type") != "BPE" or not (model.get("byte_fallback") or '"ByteLevel"' in kinds):
            return None
        shrinks = 4 if parts["normalizer"] else 1  # composed characters
        return shrinks * max(map(len, self._inner.get_vocab(with_added_tokens=True)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical tokenizer.json and of the tokens that begin and end a text."""
        content = json.dumps([json.loads(self._inner.to_str()), self.bos, self.eos], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._inner.to_str())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and what transformers needs beside it; an equal file is left untouched."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._config,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        folder.mkdir(parents=True, exist_ok=True)
        files = {_CONFIG: json.dumps(config, indent=2, ensure_ascii=False)}
        if self._chat_template is not None:
            files[_TEMPLATE] = self._chat_template
        # Last, because a folder with this file is taken to be complete.
        files[_TOKENIZER] = self._inner.to_str(pretty=True)
        for name, content in files.items():
            path, data = folder / name, content.encode()
            if not path.is_file() or path.read_bytes() != data:
                write_atomic(path, data)

    @classmethod
    def byte(cls) -> Tokenizer:
        """The 256 bytes, whose ids are their values, and one separator."""
        vocab = {char: byte for byte, char in enumerate(_byte_chars())}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
        return cls._of_ours(inner)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """Byte-level BPE (Sennrich et al. 2016) of `vocab` tokens: the separator, the bytes, the merges.

        The same texts give the same tokenizer. Few texts may yield fewer tokens than asked for.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[AddedToken(SEPARATOR, special=True, normalized=False)],
            initial_alphabet=_byte_chars(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer=trainer)
        return cls._of_ours(inner)

    @classmethod
    def _of_ours(cls, inner: tokenizers.Tokenizer) -> Tokenizer:
        # transformers puts in front of a prompt what every document of the training data begins with.
        inner.post_processor = processors.TemplateProcessing(
            single=f"{SEPARATOR} $A",
            pair=f"{SEPARATOR} $A {SEPARATOR} $B",
            special_tokens=[(SEPARATOR, _id_of(inner, SEPARATOR))],
        )
        return cls(inner, SEPARATOR, SEPARATOR, config={"add_bos_token": True})

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder, and what lies beside it for transformers."""
        path = path.expanduser()
        file = path / _TOKENIZER if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"tokenizer {file} does not exist: check the path, or write byte or {{train: bpe, vocab: N}}"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever it cannot read
            raise DataError(f"{file} is not a tokenizer.json of the tokenizers library ({error})") from None
        config = _read_config(file.with_name(_CONFIG))
        bos, eos = _ends(inner, config, file)
        template = file.with_name(_TEMPLATE)
        chat_template = template.read_text("utf-8") if template.is_file() else None
        return cls(inner, bos, eos, config=config, chat_template=chat_template)


def _id_of(inner: tokenizers.Tokenizer, token: str) -> int:
    id = inner.token_to_id(token)
    if id is None:
        raise DataError(
            f"tokenizer_config.json names {token}, which the tokenizer does not have: mend either file"
        )
    return id


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): mend or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a {type(config).__name__} instead of an object: mend or remove it")
    return config


def _ends(inner: tokenizers.Tokenizer, config: dict[str, Any], file: Path) -> tuple[str, str]:
    """The tokens that begin and end a text; one that is not named is the other one."""
    bos, eos = _content(config.get("bos_token")), _content(config.get("eos_token"))
    if bos or eos:
        return bos or str(eos), eos or str(bos)
    for begin, end in _WELL_KNOWN:
        if inner.token_to_id(begin) is not None and inner.token_to_id(end) is not None:
            return begin, end
    names = ", ".join(" and ".join(dict.fromkeys(pair)) for pair in _WELL_KNOWN)
    raise DataError(
        f"{file} has no token that ends a text (looked for {names}): "
        f"name bos_token and eos_token in a {_CONFIG} beside it"
    )


def _content(token: Any) -> str | None:
    # Either "token" or {"content": "token", ...}, depending on the version that wrote the file.
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _byte_chars() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2's table); printable ones stay."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
