"""Tokenizers: nothing is lost, nothing in a text is special, and transformers agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muster.data.tokenizer import SEPARATOR, Tokenizer
from muster.errors import DataError

TEXTS = st.text(max_size=60) | st.lists(st.sampled_from([SEPARATOR, " a", "\n", "\r\n", "é", "\0"])).map(
    "".join
)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_text_survives_and_is_never_special(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, Tokenizer.byte()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_id not in ids


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = Tokenizer.byte()
    assert tokenizer.encode("né\0") == list("né\0".encode())
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)


def test_separators_leave_no_text(bpe: Tokenizer) -> None:
    assert bpe.decode([bpe.bos_id, *bpe.encode("a"), bpe.eos_id, *bpe.encode(SEPARATOR)]) == f"a{SEPARATOR}"


def test_batch_is_the_same_as_one_by_one(bpe: Tokenizer) -> None:
    texts = ["def f(value):", "", "日本語 123456"]
    batch = bpe.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [bpe.encode(text) for text in texts]
    assert {ids.dtype.str for ids in batch} == {"<u2"}


def test_training_is_deterministic_and_digest_tells_tokenizers_apart(bpe: Tokenizer) -> None:
    texts = [f"some words {i} and {i * i} more\n" for i in range(200)]
    first, again = Tokenizer.train_bpe(texts, 320), Tokenizer.train_bpe(iter(texts), 320)
    assert first.digest == again.digest
    assert first.digest != bpe.digest
    assert first.vocab == 320


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_transformers_loads_it_with_equal_ids(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.byte() if kind == "byte" else bpe
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in ["def f(value):\n    return 123456", "naïve 日本語\r\n  \n x", "don't  stop "]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text


def test_saved_tokenizer_is_the_same_and_saving_again_writes_nothing(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.digest == bpe.digest
    loaded.save(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_lies_beside_a_tokenizer_is_kept(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.from_file(tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["model_max_length"] == 77
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("token", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}])
def test_config_names_the_ends(token: object, bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": token}))
    loaded = Tokenizer.from_file(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (bpe.eos_id, bpe.eos_id)


def test_truncation_and_padding_of_a_file_are_ignored(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    plain["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    assert len(Tokenizer.from_file(tmp_path).encode("def f(value): return value")) > 2


def test_errors_say_what_to_do(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: check the path"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match="names <gone>, which the tokenizer does not have"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    renamed = (tmp_path / "tokenizer.json").read_text().replace(SEPARATOR, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(renamed)
    with pytest.raises(DataError, match=r"no token that ends a text \(looked for"):
        Tokenizer.from_file(tmp_path)
