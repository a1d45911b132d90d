"""What `train.sync` saves between copies against summing gradients every step, by the formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muster.comm.choice import Form
from muster.observe.format import size
from muster.parallel.traffic import expected_traffic, sync_traffic
from muster.train.plan import Training
from muster.train.trainee import COMPUTE_DTYPE


@dataclass(frozen=True, slots=True)
class Savings:
    """Bytes that the first rank sends to other copies."""

    bytes_a_step: float
    """On average over the run."""
    synchronous_bytes: int
    """In every step, where gradients are summed over copies."""

    @property
    def factor(self) -> float:
        """How many times as much synchronous training sends."""
        return self.synchronous_bytes / self.bytes_a_step


def savings(training: Training) -> Savings:
    """For a run with `train.sync`."""
    train = training.run.train
    sync = train.sync
    assert sync is not None
    summed = expected_traffic(
        training.spec,
        replace(training.layout, sync=None),
        0,
        sequence=training.sequence,
        compute=COMPUTE_DTYPE[train.precision],
    ).sent_bytes_by_axis()
    gradients = _exchange_bytes(training, sync.compress_gradients)
    between = _exchange_bytes(training, sync.compress) / sync.every
    return Savings(
        bytes_a_step=sync.warmup * gradients + (1 - sync.warmup) * between if sync.is_local else gradients,
        synchronous_bytes=sum(sent for axis, sent in summed.items() if axis.endswith("replicate")),
    )


def _exchange_bytes(training: Training, form: Form) -> int:
    """For one exchange of all that the first rank holds."""
    traffic = sync_traffic(training.spec, training.layout, 0, sequence=training.sequence, form=form)
    return sum(traffic.sent_bytes_by_axis().values())


def sentence(training: Training) -> str:
    """What is done, what it sends and what that saves, for the terminal."""
    sync, saved = training.run.train.sync, savings(training)
    assert sync is not None
    rate = f"{size(saved.bytes_a_step)} a step to other copies, instead of "
    rate += f"{size(saved.synchronous_bytes)}: 1/{saved.factor:.3g}"
    if sync.kind == "delayed":
        return f"delayed: gradients are summed during the next step's passes; a rank sends {rate}"
    name = {"local_sgd": "local SGD", "diloco": "DiLoCo" if sync.fragments == 1 else "streaming DiLoCo"}[
        sync.kind
    ]
    form = "" if sync.compress == "none" else f" in {sync.compress}"
    turns = "" if sync.fragments == 1 else f", {sync.fragments} fragments in turn"
    first = f", after {sync.warmup_steps(training.steps)} steps together" if sync.warmup else ""
    return f"{name} every {sync.every} steps{turns}{form}{first}: a rank sends {rate}"
