"""Bytes per collective, and the ZeRO formulas, against sums done by hand."""

from __future__ import annotations

import pytest

from muster.comm.choice import Choice
from muster.comm.formulas import Unit, zero_traffic
from muster.comm.traffic import Kind, Tally, Traffic, sent_bytes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-reduce", 1200),
        ("all-gather", 600),
        ("reduce-scatter", 600),
        ("all-to-all", 600),
        ("broadcast", 800),
        ("send", 800),
    ],
)
def test_what_one_of_four_ranks_sends(kind: Kind, expected: int) -> None:
    assert sent_bytes(kind, 800, 4) == expected


def test_a_rank_alone_sends_nothing() -> None:
    assert sent_bytes("all-reduce", 800, 1) == 0


def test_tallies_add_up_by_axis() -> None:
    traffic = Traffic()
    traffic.count("shard", "all-gather", 100, 2)
    traffic.count("shard", "all-gather", 60, 2)
    traffic.count("shard", "reduce-scatter", 40, 2)
    traffic.count("context", "all-to-all", 10, 2, kept_bytes=9)
    assert traffic["shard", "all-gather"] == Tally(2, 160, 80)
    assert traffic.sent_bytes_by_axis() == {"shard": 100, "context": 1}
    traffic.add(traffic, times=2)
    assert traffic["shard", "all-gather"] == Tally(6, 480, 240)


UNITS = [Unit(shapes=((20, 4), (20,)), regathers=True), Unit(shapes=((10,),), regathers=False)]


@pytest.mark.parametrize(
    ("zero", "gathered_elements", "reduces"),
    [(1, 110 * 2, 1), (2, 110 * 2 * 3, 3), (3, (100 * 2 + 10) * 2 * 3, 3)],
)
def test_stages_differ_in_how_often_they_gather_and_reduce(
    zero: int, gathered_elements: int, reduces: int
) -> None:
    traffic = zero_traffic(
        UNITS,
        zero=zero,  # type: ignore[arg-type]
        shard=2,
        replicate=1,
        microbatches=3,
        parameter_bytes=2,
        choice=Choice(),
    )
    assert traffic["shard", "all-gather"].payload_bytes == gathered_elements * 2
    assert traffic["shard", "reduce-scatter"].payload_bytes == 110 * 2 * 4 * reduces
    assert set(traffic) == {("shard", "all-gather"), ("shard", "reduce-scatter")}


def test_copies_reduce_their_shards_only() -> None:
    traffic = zero_traffic(
        UNITS, zero=1, shard=2, replicate=4, microbatches=3, parameter_bytes=2, choice=Choice()
    )
    assert traffic["replicate", "all-reduce"] == Tally(2, 440, 660)


def test_compression_changes_what_is_sent() -> None:
    def sent(choice: Choice) -> dict[str, int]:
        degrees = {"zero": 1, "shard": 2, "replicate": 2, "microbatches": 1, "parameter_bytes": 2}
        return zero_traffic(UNITS, **degrees, choice=choice).sent_bytes_by_axis()  # type: ignore[arg-type]

    gathered, reduced = 110 * 2, 110 * 4
    assert sent(Choice()) == {"shard": gathered + reduced, "replicate": reduced}
    assert sent(Choice(gradients="bf16")) == {"shard": gathered + reduced // 2, "replicate": reduced // 2}
    # int8: one byte an element, and a scale of four bytes for each unit's part
    assert sent(Choice(parameters="int8"))["shard"] == 110 + 2 * 4 + reduced
    assert sent(Choice(gradients="int8")) == {"shard": gathered + 110 + 2 * 4, "replicate": 110 + 2 * 2 * 4}
    # rank 1: the 20 x 4 matrix goes as 20 + 4 elements, the vectors of 20 and 10 whole
    assert sent(Choice(gradients="powersgd", rank=1))["replicate"] == (20 + 4 + 20 + 10) * 4
