"""What the server has done, in Prometheus' text format, under vLLM's names with `muster:` in front.

Written by hand: nearly all of it is a figure of the engine's, read when somebody asks, and what is left are three
histograms of plain lists. Knows no HTTP.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from muster.serve.protocol import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Histogram:
    """Counts by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, label: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{bound}"}} {total}'
        yield f"{name}_sum{{{label}}} {self._sum}"
        yield f"{name}_count{{{label}}} {total}"


class Metrics:
    """What is counted here, beside the engine's own figures."""

    def __init__(self) -> None:
        self.ttft = Histogram(_TTFT_S)
        self.itl = Histogram(_ITL_S)
        self.e2e = Histogram(_E2E_S)
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        """Choices by how they ended; abort: the client left, or the time was up."""
        self.responses: Counter[int] = Counter()
        """By HTTP status."""
        self.in_progress = 0
        """HTTP requests that are being answered."""

    def render(self, stats: Stats, model: str) -> str:
        """Everything, as a scrape wants it."""
        label = 'model_name="' + model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
        used = stats.used_blocks / stats.blocks if stats.blocks else 0.0
        lines: list[str] = []

        def family(kind: str, name: str, what: str, samples: Sequence[tuple[str, float]]) -> None:
            lines.extend((f"# HELP muster:{name} {what}", f"# TYPE muster:{name} {kind}"))
            lines.extend(f"muster:{name}{{{label}{more}}} {value}" for more, value in samples)

        for name, what, value in (
            ("num_requests_running", "Sequences being generated.", stats.running),
            ("num_requests_waiting", "Sequences waiting to be admitted.", stats.waiting),
            ("http_requests_in_progress", "HTTP requests being answered, this one too.", self.in_progress),
            ("kv_cache_usage_perc", "Share of the KV blocks that sequences hold; 1 is all.", used),
        ):
            family("gauge", name, what, [("", value)])
        for name, what, value in (
            (
                "prefix_cache_queries_total",
                "Tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            ("prefix_cache_hits_total", "Tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("num_preemptions_total", "Sequences that gave their blocks up for others.", stats.preemptions),
            ("prompt_tokens_total", "Prompt tokens computed.", stats.prompt_tokens),
            ("generation_tokens_total", "Tokens generated.", stats.generated_tokens),
            ("spec_decode_num_draft_tokens_total", "Tokens guessed.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens_total", "Tokens guessed right.", stats.accepted_tokens),
            ("engine_steps_total", "Steps computed.", stats.steps),
        ):
            family("counter", name, what, [("", value)])
        ends = [(f',finished_reason="{reason}"', count) for reason, count in self.finished.items()]
        family("counter", "request_success_total", "Choices by how they ended.", ends)
        codes = [(f',status="{status}"', count) for status, count in sorted(self.responses.items())]
        family("counter", "http_responses_total", "Answers by HTTP status.", codes)
        for name, what, histogram in (
            (
                "time_to_first_token_seconds",
                "From the end of a request's header to its first text.",
                self.ttft,
            ),
            ("inter_token_latency_seconds", "Between one text and the next of a choice.", self.itl),
            (
                "e2e_request_latency_seconds",
                "From the end of a request's header to its answer's end.",
                self.e2e,
            ),
        ):
            family("histogram", name, what, ())
            lines.extend(histogram.lines(f"muster:{name}", label))
        return "\n".join(lines) + "\n"
