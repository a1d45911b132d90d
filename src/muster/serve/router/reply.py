"""One answer of a server, read from bytes as they come (HTTP/1.1, RFC 9112): about a quarter of the router's work.

Knows no sockets. Stricter than it has to be: whatever is not as the RFC wants it is a `BadReply`.
"""

from __future__ import annotations

import re

Headers = list[tuple[bytes, bytes]]

_HEAD_BYTES, _LINE_BYTES = 64 << 10, 4 << 10
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\0]*)?")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
_END = b"\r\n"
_UNTIL_CLOSED = -1


class BadReply(ValueError):
    """The server has said something that is not HTTP, or has closed the connection too early."""


class Reply:
    """`feed` it what is received. From `begun` on, `status` and `headers` (names in lower case) are known; `take` is
    what has come of the body since, and with `ended` that was all."""

    def __init__(self, method: str) -> None:
        self.status = 0
        self.headers: Headers = []
        self.begun = self.ended = self.reusable = False
        """`reusable`: whether the connection may carry another request after the end."""
        self._bodiless = method == "HEAD"
        self._rest = b""
        self._body: list[bytes] = []
        self._chunked = self._trailers = False
        self._left = 0
        """Bytes to come: of the body or, where that is chunked, of a chunk and the line's end behind it."""

    def feed(self, data: bytes) -> None:
        """Add bytes; none says that the connection is closed. Raises BadReply."""
        if not data:
            if not self.begun:
                raise BadReply("it closed the connection before it answered")
            if not self.ended and self._left != _UNTIL_CLOSED:
                raise BadReply("it closed the connection before its answer's end")
            self.ended, self.reusable = True, False
            return
        self._rest = self._rest + data if self._rest else data
        while not self.begun:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                if len(self._rest) > _HEAD_BYTES:
                    raise BadReply(f"its header is larger than {_HEAD_BYTES} bytes")
                return
            self._rest = rest
            self._read_head(head)
        if self._chunked:
            self._read_chunks()
        elif self._rest and not self.ended:
            self._read_plain()
        if self.ended and self._rest:
            self.reusable = False  # nobody has asked for more

    @property
    def shows(self) -> bool:
        """Whether something of the body is there to take, or nothing will be."""
        return bool(self._body) or self.ended

    def take(self) -> bytes:
        """What has come of the body, and was not taken before."""
        taken = b"".join(self._body)
        self._body.clear()
        return taken

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(_END)
        said = _STATUS.fullmatch(first)
        if said is None:
            raise BadReply("its answer does not begin as one of HTTP/1.1")
        fields = [_FIELD.fullmatch(line) for line in lines]
        headers = [(field[1].lower(), field[2]) for field in fields if field is not None]
        if len(headers) != len(lines):
            raise BadReply("its answer has a broken header")
        status = int(said[2])
        if status < 200:
            if status == 101:
                raise BadReply("it changes to another protocol")
            return  # the answer is still to come
        self.status, self.headers, self.begun = status, headers, True
        names = dict(headers)
        last_word = said[1] == b"0" or b"close" in names.get(b"connection", b"").lower()
        coding = names.get(b"transfer-encoding")
        lengths = {value for name, value in headers if name == b"content-length"}
        if self._bodiless or status in (204, 304):
            self.ended = True
        elif coding is not None:
            if coding.lower() != b"chunked" or lengths:
                raise BadReply("it says in two ways, or in an unknown one, how long its answer is")
            self._chunked = True
        elif lengths:
            length = lengths.pop()
            if lengths or not length.isdigit():
                raise BadReply("it does not say clearly how long its answer is")
            self._left = int(length)
            self.ended = self._left == 0
        else:
            self._left, last_word = _UNTIL_CLOSED, True
        self.reusable = not last_word

    def _read_plain(self) -> None:
        if self._left == _UNTIL_CLOSED:
            self._body.append(self._rest)
            self._rest = b""
            return
        self._body.append(self._rest[: self._left])
        self._rest = self._rest[self._left :]
        self._left -= len(self._body[-1])
        self.ended = self._left == 0

    def _read_chunks(self) -> None:
        data, at = self._rest, 0
        while not self.ended:
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                content = max(0, min(len(piece), self._left - 2))
                if piece[content:] != _END[max(0, 2 - self._left) :][: len(piece) - content]:
                    raise BadReply("a chunk of its answer is longer than it said")
                if content:
                    self._body.append(piece[:content])
                self._left -= len(piece)
                if self._left:
                    break
            stop = data.find(_END, at)
            if stop < 0:
                if len(data) - at > _LINE_BYTES:
                    raise BadReply("a line of its answer is too long")
                break
            line, at = data[at:stop], stop + 2
            if self._trailers:
                self.ended = not line
                continue
            size = _SIZE.fullmatch(line)
            if size is None:
                raise BadReply("a chunk of its answer does not say how long it is")
            length = int(size[1], 16)
            self._trailers = length == 0
            self._left = length + 2 if length else 0
        self._rest = data[at:]
