"""`muster verify`: show that layouts train to the numbers of one process, on this machine."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from muster.errors import ConfigError, ParityError, TrainingError

if TYPE_CHECKING:
    from muster.config import schema
    from muster.model.spec import TransformerSpec
    from muster.train.verifier import Verifier


def verify(
    run_file: Path,
    *overrides: str,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    ranks: int | None = None,
    steps: int = 5,
    real: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Train a few steps on one process and on the run's layout, in fp32, and compare every number.

    Loss, gradient norm and every weight must agree within 1e-5. The model is scaled down to seconds, keeping
    its family and options; the data are random documents. Exit code 4 where they differ.

    Parameters
    ----------
    run_file
        The run file (YAML).
    overrides
        Changes to it, as key.path=value: layout.tensor=2 layout.pipeline=2
    all_
        Verify every technique and composition that fits `ranks`, not only the run's layout.
    ranks
        Most ranks of a layout under --all. Default: 8, or the number of GPUs.
    steps
        Optimizer steps compared.
    real
        Take the model at its real size.
    json_
        Print the figures as JSON.
    """
    from muster.config.load import load_run
    from muster.config.schema import Layout
    from muster.model.build import spec_from_config
    from muster.train.origin import read_spec
    from muster.train.verifier import Verifier
    from muster.train.verify import scaled, sequences_for

    run = load_run(run_file, overrides)
    spec = spec_from_config(run.model, _vocabulary(run), run_file.parent, read_spec)
    said = _resolvable(run, spec)
    own = Layout() if all_ else said
    spec = spec if real else scaled(spec, own)
    layouts = _fitting(run, spec, ranks) if all_ else {_named(said): _said(said)}
    # Ending as from Ctrl-C, it leaves neither ranks nor files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as scratch:
        verifier = Verifier(
            run=run, spec=spec, steps=steps, sequences=sequences_for(own), scratch=Path(scratch)
        )
        rows = _table(verifier, layouts, quiet=json_)
    wrong = [row for row in rows if not row["ok"]]
    if json_:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    if wrong:
        raise ParityError(
            f"{len(wrong)} of {len(rows)} layouts do not train like one process, the first {wrong[0]['layout']}: "
            f"{wrong[0]['why']}; do not train on them, and report this"
        )
    if not json_:
        sys.stdout.write(f"all {len(rows)} layouts agree with one process over {steps} steps\n")


def _table(verifier: Verifier, layouts: dict[str, dict[str, Any]], *, quiet: bool) -> list[dict[str, Any]]:
    from muster.parallel.catalogue import world_of

    def say(line: str) -> None:
        if not quiet:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    width = max(map(len, layouts), default=0)
    say(f"{'layout':{width}}  ranks     loss  grad norm  weights")
    rows = []
    for name, layout in layouts.items():
        row: dict[str, Any] = {"layout": name, "ranks": world_of(layout), "degrees": layout}
        try:
            found = verifier.verify(layout)
        except TrainingError as error:
            row |= {"ok": False, "why": str(error).splitlines()[-1]}
            say(f"{name:{width}}  {row['ranks']:5}  failed: {row['why']}")
        else:
            row |= {"ok": found.ok, **asdict(found)}
            figures = f"{found.loss:8.1e}  {found.gradient_norm:9.1e}  {found.weights:7.1e}"
            if not found.ok:
                row["why"] = _explained(verifier, layout, found.first)
            say(f"{name:{width}}  {row['ranks']:5} {figures}  {row.get('why', 'ok')}")
        rows.append(row)
    return rows


def _explained(verifier: Verifier, layout: dict[str, Any], first: str | None) -> str:
    culprits = verifier.culprits(layout)
    axis = f"axis {' and '.join(culprits)}" if culprits else "only its axes together, not one alone"
    return f"differs first in {first or 'loss or gradient norm'}; {axis}"


def _vocabulary(run: schema.Run) -> int:
    tokenizer = run.data.tokenizer
    return 258 if tokenizer is None or isinstance(tokenizer, str) else tokenizer.vocab


def _resolvable(run: schema.Run, spec: TransformerSpec) -> schema.Layout:
    """The run's own layout; ConfigError where the model at its real size, or the batch, does not allow it."""
    import torch

    from muster.config.schema import Layout
    from muster.parallel.layout import resolve
    from muster.parallel.world import usable_cores

    resolved = resolve(run, spec, cores=usable_cores(), gpus=torch.cuda.device_count())
    return Layout(replicate=resolved.replicate) if isinstance(run.layout, str) else run.layout


def _fitting(run: schema.Run, spec: TransformerSpec, ranks: int | None) -> dict[str, dict[str, Any]]:
    """All layouts of up to `ranks` ranks that the model can be trained on, by name."""
    import torch

    from muster.parallel.catalogue import catalogue
    from muster.train.verify import case

    fitting = {}
    for name, layout in catalogue(ranks or torch.cuda.device_count() or 8, experts=spec.experts).items():
        try:
            case(run, spec, layout, 1)
        except ConfigError:
            continue  # such as ulysses with fewer heads than ranks
        fitting[name] = layout
    return fitting


def _named(layout: schema.Layout) -> str:
    return ", ".join(f"{key} {value}" for key, value in _said(layout).items()) or "one process"


def _said(layout: schema.Layout) -> dict[str, Any]:
    """What a layout says beyond the defaults that can change nothing.

    The check's own batch decides on microbatches, and compressed gradients differ by design.
    """
    default = type(layout)()
    names = [name for name in layout.__dataclass_fields__ if name not in ("microbatch", "compress")]
    return {name: getattr(layout, name) for name in names if getattr(layout, name) != getattr(default, name)}
