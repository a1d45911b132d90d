"""AdamW one unit at a time is torch's AdamW, and its state has the names that checkpoints rely on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muster.config import schema
from muster.train.adamw import AdamW
from muster.train.optimizer import make_optimizer

CONFIG = schema.Optimizer(lr=0.01, weight_decay=0.1)


class Toy(nn.Module):
    """Two blocks and what is around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleDict({str(layer): nn.Linear(6, 7) for layer in range(2)})
        self.norm = nn.LayerNorm(6)


def give_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_it_is_torchs_adamw_bit_for_bit() -> None:
    ours, theirs = Toy(), Toy()
    optimizer = make_optimizer(dict(ours.named_parameters()), CONFIG, compute=torch.float32)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=CONFIG.betas, eps=CONFIG.eps, fused=True)
    for step in range(4):
        for model in (ours, theirs):
            give_gradients(model, step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step(0.01 * (step + 1))
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


def test_every_unit_is_fused() -> None:
    optimizer = make_optimizer(dict(Toy().named_parameters()), CONFIG, compute=torch.float32)
    assert isinstance(optimizer, AdamW)
    assert list(optimizer._units) == ["embed.weight", "layers.0", "layers.1", "norm.weight", "norm.bias"]
    assert all(group["fused"] for unit in optimizer._units.values() for group in unit.param_groups)


def test_filling_the_state_continues_a_run() -> None:
    def train(model: nn.Module, steps: range, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        optimizer = make_optimizer(dict(model.named_parameters()), CONFIG, compute=torch.float32)
        if state is not None:
            for name, tensor in optimizer.state().items():
                tensor.copy_(state[name])
            optimizer.set_steps(steps.start)
        for step in steps:
            give_gradients(model, step)
            optimizer.step(0.01)
        return optimizer.state()

    straight, resumed = Toy(), Toy()
    train(straight, range(5))
    state = train(resumed, range(3))
    assert "exp_avg.layers.0.weight" in state
    assert len(state) == 2 * len(list(resumed.parameters()))
    train(resumed, range(3, 5), state)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
