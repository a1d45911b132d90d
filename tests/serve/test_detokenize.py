from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from muster.serve.detokenize import Detokenizer, StopStrings


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def pieces(text: bytes) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(byte) for byte in text), detokenizer.flush()]


def test_a_character_appears_when_its_last_byte_does() -> None:
    assert pieces("aé€😀b".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_flushed_as_a_replacement() -> None:
    assert pieces(b"a\xe2\x82") == ["a", "", "", "\ufffd"]


def test_invalid_bytes_are_not_held_back_for_long() -> None:
    detokenizer = Detokenizer(decode)
    shown = "".join(detokenizer.push(0xFF) for _ in range(100))
    assert len(shown) >= 97


def test_pieces_concatenate_to_the_text_of_random_bytes() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        text = bytes(rng.choice(b"ab\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff\x80") for _ in range(40))
        assert "".join(pieces(text)) == decode(text)


def test_spacing_that_depends_on_what_came_before() -> None:
    words = ["▁Hello", "▁world", "!"]

    def metaspace(ids: Sequence[int]) -> str:  # as SentencePiece: the first space of a text is dropped
        return "".join(words[id] for id in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(metaspace)
    assert [detokenizer.push(id) for id in (0, 1, 2)] == ["Hello", " world", "!"]
    assert Detokenizer(metaspace, before=[0]).push(1) == " world"


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["STOP"], "go on STOP never", "go on "),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["aab"], "aaab", "a"),
        (["xyz", "b"], "abxyz", "a"),
        (["long stop", "st"], "a long stop", "a long "),
        (["STOP"], "STO", "STO"),
        ([], "anything", "anything"),
        ([""], "anything", "anything"),
        (["é"], "caféx", "caf"),
    ],
)
def test_stop_strings_across_any_borders(stops: list[str], text: str, expected: str) -> None:
    for size in range(1, len(text) + 1):
        stop = StopStrings(stops)
        shown = ""
        for start in range(0, len(text), size):
            shown += stop.push(text[start : start + size])
            assert expected.startswith(shown)  # no part of a stop string ever leaks
            if stop.found:
                break
        if not stop.found:
            shown += stop.flush()
        assert shown == expected


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    stop = StopStrings(["\nuser:"])
    assert stop.push("hello") == "hello"
    assert stop.push("\nus") == ""
    assert stop.push("ual") == "\nusual"
