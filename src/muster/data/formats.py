"""What is inside a file of a source: one document (text and code), or one a record (.jsonl, .parquet).

A file is read twice. `scan` checks all of it, takes its digest and divides it into parts; `texts`
then reads any part by itself, so that work can be shared out, and resumed, by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from muster.data import columnar, jsonl, textfile
from muster.data.parts import Advance, Part, Scan, Text
from muster.data.sources import File
from muster.errors import DataError

_BY_SUFFIX = {".jsonl": jsonl, ".parquet": columnar, ".arrow": columnar}


def scan(file: File, text_field: str, advance: Advance) -> Scan:
    """Read a whole file. A text file that is none is a `problem` of the scan, a broken record a DataError."""
    try:
        found: Scan = _format(file).scan(file, text_field, advance)
    except OSError as error:
        raise DataError(
            f"{file.path} cannot be read ({error.strerror}): exclude it, or mend its permissions"
        ) from None
    file.check_unchanged()
    return found


def texts(file: File, part: Part, text_field: str) -> Iterator[Text]:
    """Pieces of the documents of one part, in order; raises DataError if the file changed since its scan."""
    yield from _format(file).texts(file, part, text_field)


def _format(file: File) -> ModuleType:
    return _BY_SUFFIX.get(file.path.suffix.lower(), textfile)
