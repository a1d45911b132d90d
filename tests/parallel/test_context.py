"""Who holds which tokens, which degrees are legal, and which kind is chosen."""

from __future__ import annotations

import pytest
import torch

from muster.parallel.context import Kind, choose, chunks, moved, problems
from muster.parallel.sequence import split

KINDS: list[Kind] = ["ulysses", "ring"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_is_on_one_rank(kind: Kind, ranks: int) -> None:
    whole = torch.randn(2, 24, 3)
    parts = [split(whole, 1, rank=rank, ranks=ranks, kind=kind) for rank in range(ranks)]
    assert {part.shape for part in parts} == {(2, 24 // ranks, 3)}
    at = [split(torch.arange(24), 0, rank=rank, ranks=ranks, kind=kind) for rank in range(ranks)]
    assert torch.equal(torch.cat(at).sort().values, torch.arange(24))
    for own, part in zip(at, parts, strict=True):
        assert torch.equal(whole[:, own], part)


def test_a_ring_gives_every_rank_the_same_work() -> None:
    for ranks in (2, 4, 8):
        work = [sum(2 * chunk + 1 for chunk in chunks(rank, ranks, "ring")) for rank in range(ranks)]
        assert len(set(work)) == 1


def test_legal_plans_have_no_problems() -> None:
    assert problems(64, heads=8, tensor=2, context=4, kind="ulysses", lengths=[]) == []
    assert problems(64, heads=3, tensor=1, context=4, kind="ring", lengths=[]) == []


def test_problems_name_the_nearest_legal_values() -> None:
    assert problems(100, heads=8, tensor=1, context=8, kind="ring", lengths=range(1, 129)) == [
        "layout.context: ring over 8 ranks cuts a sequence into 16 equal chunks, which 100 tokens do not give; "
        "use context 5 or 10 or train.sequence 96 or 112"
    ]
    assert problems(3, heads=8, tensor=1, context=4, kind="ulysses", lengths=[1, 3]) == [
        "layout.context: ulysses over 4 ranks cuts a sequence into 4 equal chunks, which 3 tokens do not give; "
        "use context 1"
    ]
    assert problems(64, heads=12, tensor=2, context=4, kind="ulysses", lengths=[64]) == [
        "layout.context: ulysses gives each rank an equal share of the 6 heads that tensor 2 leaves, which 4 ranks do "
        "not divide; use context 2, or ring"
    ]
    assert len(problems(9, heads=9, tensor=1, context=2, kind="ulysses", lengths=[9])) == 2


@pytest.mark.parametrize(
    ("heads", "kv_heads", "context", "kind"),
    [(32, 32, 8, "ulysses"), (32, 8, 4, "ulysses"), (6, 2, 4, "ring"), (32, 1, 2, "ring")],
)
def test_choice(heads: int, kv_heads: int, context: int, kind: Kind) -> None:
    chosen, reason = choose(heads, kv_heads, context)
    assert chosen == kind
    assert reason.startswith(f"{kind}: ")


def test_traffic_counts_both_passes() -> None:
    # Ulysses: q, k, v there and the output back, half of each stays; the same for the gradients.
    assert moved(4, 2, 2, "ulysses") == 2 * (4 + 2 + 2 + 4) / 2
    # Ring: k and v once in either pass, their gradients in fp32 (twice as wide) all the way home.
    assert moved(4, 2, 2, "ring") == 2 * 2 + 2 * 2 + 2 * 2 * 2 * 2
