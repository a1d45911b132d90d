"""The first tokens of an engine, before it is said to be ready: what they build or read first, no client waits for."""

from __future__ import annotations

from muster.serve.protocol import Engine, Request, SamplingParams


async def warm_up(engine: Engine) -> None:
    """Generate a little; raises EngineError when that fails."""
    request = Request(id="warm-up", prompt=(0,), params=SamplingParams(max_tokens=1, temperature=0))
    async for _ in engine.submit(request):
        pass
