"""Which documents are held out: those whose name hashes below a threshold, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muster.data.catalogue import Catalogue, Entry
from muster.data.parts import Part, Text, name_hash
from muster.errors import DataError

_ALL = 1 << 64


@dataclass(frozen=True, slots=True)
class Split:
    """The documents of one source, divided in two."""

    catalogue: Catalogue
    threshold: int
    """Name hash below which a document is held out."""

    def is_held_out(self, document: str) -> bool:
        return name_hash(document) < self.threshold

    def training_texts(self, entry: Entry, part: Part) -> Iterator[Text]:
        return (text for text in self.catalogue.texts(entry, part) if not self.is_held_out(text.document))

    def held_out_texts(self, entry: Entry, part: Part) -> Iterator[Text]:
        return (text for text in self.catalogue.texts(entry, part) if self.is_held_out(text.document))

    def identity(self, entry: Entry, part: Part) -> list[object]:
        """Everything that the texts of a part, and which of them are held out, depend on."""
        content: list[object] = [entry.scan.digest, part.start, part.stop]
        if part.row == 0:  # a text file: as a whole or not at all, whatever it is called
            return [*content, self.is_held_out(entry.file.name)]
        return [*content, entry.file.name, part.row, self.threshold, self.catalogue.source.text]


def split(catalogues: Sequence[Catalogue], held_out: float) -> list[Split]:
    """Hold out that share of the documents, by chance.

    Every source keeps at least one training document; if chance holds none out at all, the document
    with the lowest hash is taken. Raises DataError where that is impossible.
    """
    wanted = round(held_out * _ALL)
    thresholds = [min(wanted, catalogue.highest) for catalogue in catalogues]
    if wanted and all(c.lowest >= limit for c, limit in zip(catalogues, thresholds, strict=True)):
        divisible = [s for s, catalogue in enumerate(catalogues) if catalogue.lowest < catalogue.highest]
        if not divisible:
            documents = sum(catalogue.documents for catalogue in catalogues)
            raise DataError(
                f"{held_out:.3g} of the documents are to be held out, but the sources have only {documents} "
                f"in all: write held_out: 0, or divide the text over more files"
            )
        chosen = min(divisible, key=lambda s: catalogues[s].lowest)
        thresholds[chosen] = catalogues[chosen].lowest + 1
    return [Split(catalogue, limit) for catalogue, limit in zip(catalogues, thresholds, strict=True)]
