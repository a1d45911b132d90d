"""What one client may cost: sizes, times and counts, each stated once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of an HTTP server. `context_tokens` belongs to the model; the rest has working defaults."""

    context_tokens: int
    """Prompt and completion together."""
    choices: int = 64
    """Sequences of one request: prompts x n."""
    body_bytes: int = 4 << 20
    """Size of a request's body."""
    header_bytes: int = 32 << 10
    """Size of a request's header."""
    header_s: float = 10.0
    """Time from the connection, or from a further request's first byte, to the end of the header."""
    body_s: float = 30.0
    """Time from the end of the header to the end of the body."""
    stalled_write_s: float = 30.0
    """Time a client may leave a full send buffer unread before the connection is cut."""
    request_s: float = 300.0
    """Time from a complete request to the end of its answer."""
    connections: int = 4000
    """Connections at the same time; for a further one, that which has gone without a request for longest is closed."""
    shutdown_s: float = 25.0
    """Time running requests get to finish when the server is told to stop: less than the 30 s after which Kubernetes
    kills."""
