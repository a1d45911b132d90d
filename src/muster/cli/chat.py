"""`muster chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from muster.errors import MusterError, UsageError

if TYPE_CHECKING:
    from muster.serve.talk import Manner, Partner


def chat(
    model: str,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int | None = None,
    dtype: Literal["bf16", "fp32", "int8", "int4"] = "bf16",
) -> None:
    """Talk to a model: a line in, an answer out, until the end of input.

    A model without a chat template continues each line instead. With input from a pipe, each line
    is answered. In a terminal, Ctrl-C stops an answer, /new starts afresh, Ctrl-D leaves.

    Parameters
    ----------
    model
        A run folder, a folder in Hugging Face layout, or the URL of a server (http://127.0.0.1:8000).
    system
        Instructions that precede the conversation.
    temperature
        0 always takes the most likely token; higher values are more varied.
    max_tokens
        Longest answer, in tokens. Default: 256, or what the context has room for.
    dtype
        Format of the weights of a model loaded here; int8 and int4 are the fast ones, bf16 the exact one.
    """
    from muster.serve.talk import Manner

    if not 0 <= temperature <= 2:
        raise UsageError(f"--temperature {temperature:g} is outside 0 to 2")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} should be at least 1")
    with closing(_partner(model, dtype)) as partner:
        _converse(partner, system, Manner(temperature=temperature, max_tokens=max_tokens))


def _partner(model: str, dtype: Literal["bf16", "fp32", "int8", "int4"]) -> Partner:
    if model.startswith(("http://", "https://")):
        from muster.serve.talk import RemotePartner

        return RemotePartner(model)
    from muster.serve.opening import open_model
    from muster.serve.talk import LocalPartner

    return LocalPartner(open_model(Path(model), dtype=dtype))


def _converse(partner: Partner, system: str | None, manner: Manner) -> None:
    interactive = sys.stdin.isatty()
    if not partner.chats:
        if system is not None:
            raise UsageError(
                f"{partner.model_id} has no chat template, so --system has no place in its prompt"
            )
        sys.stderr.write(
            f"{partner.model_id} is a base model without a chat template: it continues your text\n"
        )
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    for line in _lines(interactive):
        if line.strip() == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _print_answer(partner.say(messages if partner.chats else line, manner))
        except MusterError as error:
            if not interactive:
                raise
            sys.stderr.write(f"{error}\n")
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _print_answer(pieces: Iterator[str]) -> str:
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:  # enough of this answer
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    return answer


def _lines(interactive: bool) -> Iterator[str]:
    """Non-empty lines of standard input; what is not UTF-8, or not in the terminal's alphabet, as signs."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    while True:
        if interactive:
            sys.stdout.write("> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
