"""The folder in which runs of one machine keep what they made of their sources.

    catalogues/  what the files of a source hold, by the files' names and times
    tokenizers/  trained tokenizers, by the texts they were trained on
    shards/      tokens of a few megabytes of documents, by tokenizer and content
    indexes/     the shards that a source consists of
    lock         held by whoever writes

All of it can be deleted at any time that no run starts; it is then made again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from muster.data.files import exclusive, remove_drafts
from muster.errors import DataError


class Cache:
    """Paths of the folders, which exist, and their common lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalogues, self.tokenizers = root / "catalogues", root / "tokenizers"
        self.shards, self.indexes = root / "shards", root / "indexes"
        try:
            for folder in (self.catalogues, self.tokenizers, self.shards, self.indexes):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cache folder {root} cannot be made ({error.strerror}): mend that or run elsewhere"
            ) from None

    def lock(self) -> AbstractContextManager[None]:
        """One process of the machine at a time; a killed one lets go of it."""
        return exclusive(self.root / "lock")

    def sweep(self) -> None:
        """Delete what killed writers left behind; the caller holds the lock."""
        remove_drafts(self.root)
