"""Data sets of the Hugging Face hub: `datasets` fetches them, and their Arrow files are read like others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muster.errors import DataError, MissingExtra


def arrow_files(name: str) -> list[Path]:
    """Files of the training split of `owner/name`, or of one configuration as `owner/name:configuration`."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra(f"hf: {name}", "hf") from None
    repository, _, configuration = name.partition(":")
    try:
        data: Any = datasets.load_dataset(repository, configuration or None, split="train")
    except Exception as error:  # whatever the network, the hub or the data set's own files raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data set {name} cannot be loaded ({reason}): check its name and the network"
        ) from None
    files = [Path(file["filename"]) for file in data.cache_files]
    if not files:
        raise DataError(
            f"data set {name} has no files on disk: save it as .parquet and name that under files"
        )
    return files
