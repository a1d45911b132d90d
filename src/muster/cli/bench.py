"""`muster bench serve`: what answers of an OpenAI-compatible server are like under load."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cyclopts import App

from muster.errors import MissingExtra, MusterError, UsageError

bench = App(name="bench", help="Measure a server under load.")


@bench.command
def serve(
    url: str,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    requests: int = 100,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    shared_prefix: int = 0,
    groups: int = 1,
    spread: float = 0.0,
    vocab: int = 256,
    seed: int = 0,
    slo_ttft: str | None = None,
    slo_tpot: str | None = None,
    model: str | None = None,
    json_: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Send synthetic requests to a server and print percentiles and rates.

    Any server with OpenAI's /v1/completions will do that takes token ids as a prompt and sends `usage`: muster,
    vLLM, llama.cpp. A key is taken from OPENAI_API_KEY.

    Parameters
    ----------
    url
        Address of the server, as http://127.0.0.1:8000.
    rate
        Requests a second on average, at random times, however slow the answers are (open loop).
    concurrency
        So many clients, each of which waits for its answer before it asks again (closed loop). Default: 8.
    requests
        Requests in all.
    prompt_tokens
        Length of each prompt, without a shared prefix.
    output_tokens
        Length of each answer; the end-of-sequence token does not end it where the server knows `ignore_eos`.
    shared_prefix
        Tokens that the prompts of a group begin with, as with a system prompt.
    groups
        Groups of requests, each with a shared prefix of its own.
    spread
        Lengths vary by this share of themselves: 0.5 is from half to one and a half.
    vocab
        Prompts are token ids below this.
    seed
        Same seed, same requests at the same times.
    slo_ttft
        Answers count as good when the first token comes within this time, as 500ms.
    slo_tpot
        And when the others come this quickly on average, as 50ms.
    model
        Name of the model. Default: the first that the server names.
    json_
        Write the figures there.
    plot
        Draw the distributions there, as SVG.
    """
    if rate is not None and concurrency is not None:
        raise UsageError(
            "--rate sends whatever the server does, --concurrency waits for it: give one of them"
        )
    for name, value in {
        "--requests": requests, "--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens,
        "--groups": groups, "--vocab": vocab, "--concurrency": 1 if concurrency is None else concurrency,
    }.items():  # fmt: skip
        if value < 1:
            raise UsageError(f"{name} {value} should be at least 1")
    if rate is not None and rate <= 0:
        raise UsageError(f"--rate {rate:g} should be more than 0")
    if not 0 <= spread < 1:
        raise UsageError(f"--spread {spread:g} should be from 0 to less than 1")
    if shared_prefix < 0:
        raise UsageError(f"--shared-prefix {shared_prefix} should be 0 or more")
    try:
        from muster.serve.load.client import Outcome, Server
    except ModuleNotFoundError as error:
        if str(error.name).startswith("muster"):
            raise
        raise MissingExtra("muster bench serve", "serve") from None
    import asyncio

    from muster.config.units import parse_seconds
    from muster.serve.load import drive, figures, workload

    def seconds(flag: str, said: str | None) -> float | None:
        try:
            return None if said is None else parse_seconds(said)
        except ValueError as error:
            raise UsageError(f"{flag}: {error}") from None

    objective = figures.Objective(
        ttft_s=seconds("--slo-ttft", slo_ttft), tpot_s=seconds("--slo-tpot", slo_tpot)
    )
    load = workload.Workload(
        requests=requests, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        shared_prefix_tokens=shared_prefix, groups=groups, spread=spread, vocab=vocab, seed=seed,
    )  # fmt: skip
    done = 0

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {requests}" + ("\n" if done == requests else ""))

    async def run() -> list[Outcome]:
        server = Server(url, key=os.environ.get("OPENAI_API_KEY"))
        name = model or await server.model()
        sent = list(workload.requests(load))
        if rate is not None:
            return await drive.open_loop(server, name, sent, rate=rate, seed=seed, tell=tell)
        return await drive.closed_loop(server, name, sent, concurrency=concurrency or 8, tell=tell)

    outcomes = asyncio.run(run())
    found = figures.summarize(outcomes, objective)
    sys.stdout.write("\n".join(figures.lines(found)) + "\n")
    if json_ is not None:
        json_.write_text(json.dumps(found, indent=1) + "\n")
    if plot is not None:
        plot.write_text(figures.picture(outcomes))
    if not found["succeeded"]:
        raise MusterError("no request was answered: the errors above say why")
