"""`muster convert`: a checkpoint of another trainer as a model folder, or as a run's checkpoint to go on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal


def convert(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    runs: Path = Path("runs"),
) -> None:
    """Convert a checkpoint of DeepSpeed or Megatron-LM; nothing in its pickles is executed.

    Parameters
    ----------
    source
        The folder that the trainer saved to, or one checkpoint in it; or one of muster's own, to be written
        as a model folder.
    target
        A new folder: the weights in Hugging Face layout, checked in transformers; `model.from` and serving take
        it. Or a run file (.yaml): weights and moments become a checkpoint that `muster train` resumes.
    like
        A folder with the model's config.json and tokenizer, where SOURCE does not lie beside them.
    dtype
        Of the weights in the folder.
    runs
        Folder of the runs.
    """
    if target.suffix in (".yaml", ".yml"):
        _to_run(source, target, runs)
    else:
        _to_folder(source, target, like, dtype)


def _to_run(path: Path, run_file: Path, runs: Path) -> None:
    from muster.config.load import load_run

    run = load_run(run_file, ())

    import torch

    from muster.convert.checkpoint import refuse_misfit, write_checkpoint
    from muster.convert.opening import open_source
    from muster.observe.progress import ByteProgress
    from muster.train import plan as planning
    from muster.train.entry import claim

    source = open_source(path)
    plan = planning.make(
        run,
        base=run_file.parent,
        folder=runs / run.name,
        gpus=torch.cuda.device_count(),
        progress=ByteProgress(),
    )
    refuse_misfit(source, plan)
    claim(plan)
    written = write_checkpoint(source, plan)
    sys.stdout.write(
        f"wrote    {written} from {source.label}\n"
        f"next     `muster train {run_file}` resumes at step {source.steps} of {plan.steps}, with the data, batches "
        f"and learning rate of that file\n"
    )


def _to_folder(path: Path, target: Path, like: Path | None, dtype: Literal["fp32", "bf16"]) -> None:
    import torch

    from muster.cli.export import probe_of
    from muster.config.schema import Parity
    from muster.convert.opening import model_folder, open_source, spec_for
    from muster.data.tokenizer import Tokenizer
    from muster.errors import UsageError
    from muster.export.hf import export_hf
    from muster.export.trained import is_ours, load_trained
    from muster.model.transformer import Transformer, named_tensors

    if is_ours(path):
        trained = load_trained(path)
        state, spec, tokenizer = dict(named_tensors(trained.model)), trained.model.spec, trained.tokenizer
        label = f"{trained.checkpoint}"
    else:
        source = open_source(path)
        described_in = model_folder(path, like)
        spec = spec_for(source, described_in)
        if described_in is None:
            raise UsageError(f"{path} has no tokenizer beside it: name a folder with one (--like FOLDER)")
        tokenizer, label = Tokenizer.from_file(described_in), source.label
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in named_tensors(Transformer(spec))}
        value = source.values("weights", spec)
        state = {name: value(name, shape) for name, shape in shapes.items()}
    report = export_hf(
        state,
        spec,
        tokenizer,
        target,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        limits=Parity(),
        probe_tokens=probe_of(spec),
        provenance={"converted": str(path), "checkpoint": label},
    )
    sys.stdout.write(f"wrote    {target} from {label}\nparity   {report.line()}: ok\n")
