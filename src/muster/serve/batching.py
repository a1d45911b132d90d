"""The first engine: one thread owns the model and decodes all running sequences in one forward a step.

`schedule` decides, `sampler` draws; this file moves data between the event loop, the KV cache and
the model, on the thread's side of `crossing`. A failing step fails the sequences it computed
and nothing else.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from muster.model.cache import KVCache
from muster.model.transformer import Transformer
from muster.serve.crossing import Crossing, Delivery, Stream
from muster.serve.protocol import EngineError, FinishReason, Request, Token
from muster.serve.sampler import Draw, sample, top_logprobs
from muster.serve.schedule import Prefill, Progress, admissions, next_step

_LOG = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Prompt tokens computed in one step at most: the longest delay of the others' next token."""


@dataclass(slots=True)
class _Sequence:
    """A request in a slot, on the engine's thread."""

    stream: Stream
    arrival: int
    seed: int
    cached_tokens: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.stream.request

    @property
    def progress(self) -> Progress:
        return Progress(self.arrival, len(self.request.prompt), self.cached_tokens)

    @property
    def draw(self) -> Draw:
        params = self.request.params
        return Draw(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=self.seed,
            position=len(self.generated),
        )


class BatchingEngine:
    """Continuous batching over a fixed number of KV-cache slots; an `Engine`.

    `streams` sequences of up to `context_tokens` run at once and `waiting_limit` more may wait.
    Tokens from `vocab` on (padding of the embedding matrix) are never drawn. `threads` sets torch's
    threads for the engine; None leaves them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        streams: int,
        context_tokens: int | None = None,
        waiting_limit: int = 256,
        vocab: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._model = model.eval()
        self._vocab = vocab
        self._threads = threads
        weight = next(model.parameters())
        self._device = weight.device
        self._cache = KVCache(
            model.spec,
            slots=streams,
            capacity=context_tokens or model.spec.context,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._slots: list[_Sequence | None] = [None] * streams
        self._arrivals = 0
        self._crossing = Crossing(waiting_limit)
        self._thread = threading.Thread(target=self._run, name="muster-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return sum(sequence is not None for sequence in self._slots)

    def submit(self, request: Request) -> AsyncIterator[Token]:
        return self._crossing.submit(request)

    def cancel(self, request_id: str) -> None:
        self._crossing.cancel(request_id)

    def close(self) -> None:
        self._crossing.close()
        self._thread.join()

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._crossing.wait(busy=any(self._slots)):
                self._free_cancelled()
                self._admit()
                self._crossing.deliver(self._step())
        self._crossing.deliver(self._abandon())

    def _free_cancelled(self) -> None:
        cancelled = self._crossing.take_cancelled()
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and sequence.request.id in cancelled:
                self._free(slot)

    def _admit(self) -> None:
        for slot in admissions(self._crossing.waiting(), self._progress()):
            stream = self._crossing.take_waiting()
            if stream is None:  # cancelled since it was counted
                return
            asked = stream.request.params.seed
            seed = secrets.randbits(63) if asked is None else asked
            self._slots[slot] = _Sequence(stream, self._arrivals, seed)
            self._arrivals += 1

    def _step(self) -> list[Delivery]:
        step = next_step(self._progress(), PREFILL_TOKENS)
        deliveries = []
        for prefill in step.prefills:
            deliveries += self._guarded([prefill.slot], partial(self._prefill, prefill))
        if step.decode:
            deliveries += self._guarded(step.decode, partial(self._decode, step.decode))
        return deliveries

    def _guarded(self, slots: Sequence[int], work: Callable[[], list[Delivery]]) -> list[Delivery]:
        """`work`, or the failure of the sequences in `slots`."""
        try:
            return work()
        except Exception as error:
            _LOG.error("a step of %d sequences failed", len(slots), exc_info=error)
            cause = EngineError(
                f"generation failed ({type(error).__name__}); the server's log has the details"
            )
            return [(self._free(slot).stream, cause) for slot in slots if self._slots[slot] is not None]

    def _prefill(self, prefill: Prefill) -> list[Delivery]:
        sequence = self._at(prefill.slot)
        chunk = sequence.request.prompt[prefill.start : prefill.stop]
        logits = self._forward([prefill.slot], [chunk])
        return self._draw([prefill.slot], logits) if sequence.progress.prefilled else []

    def _decode(self, slots: Sequence[int]) -> list[Delivery]:
        logits = self._forward(slots, [self._at(slot).generated[-1:] for slot in slots])
        return self._draw(slots, logits)

    def _forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens (B, T) to the sequences in `slots`; logits of the last position (B, V)."""
        inputs = torch.tensor(tokens, device=self._device)
        logits = self._model(inputs, cache=self._cache.select(slots))
        for slot in slots:
            self._at(slot).cached_tokens += inputs.shape[1]
        last: Tensor = logits[:, -1, : self._vocab].float()
        return last

    def _draw(self, slots: Sequence[int], logits: Tensor) -> list[Delivery]:
        """The next token of the sequences in `slots`, from logits (B, V); frees those that end."""
        sound = logits.isfinite().all(dim=-1).tolist()
        ids = sample(logits, [self._at(slot).draw for slot in slots]).tolist()
        deliveries: list[Delivery] = []
        for row, slot in enumerate(slots):
            sequence = self._at(slot)
            item: Token | EngineError
            if sound[row]:
                sequence.generated.append(ids[row])
                item = self._token(sequence, logits[row])
            else:
                item = EngineError(
                    "the model's output is not finite (nan or inf): its weights may be damaged"
                )
            if not sound[row]:
                self._wipe(slot)
            if isinstance(item, EngineError) or item.finish_reason is not None:
                self._free(slot)
            deliveries.append((sequence.stream, item))
        return deliveries

    def _token(self, sequence: _Sequence, logits: Tensor) -> Token:
        params, id = sequence.request.params, sequence.generated[-1]
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if params.logprobs is not None:
            logprob, top = top_logprobs(logits, id, params.logprobs)
        reason: FinishReason | None = "length" if len(sequence.generated) >= params.max_tokens else None
        if id in params.stop_ids:
            reason = "stop"
        return Token(id=id, logprob=logprob, top_logprobs=top, finish_reason=reason)

    def _abandon(self) -> list[Delivery]:
        error = EngineError("the engine is stopping")
        running = [self._free(slot).stream for slot, sequence in enumerate(self._slots) if sequence]
        waiting = list(iter(self._crossing.take_waiting, None))
        return [(stream, error) for stream in running + waiting]

    def _wipe(self, slot: int) -> None:
        """Remove nan from a slot: masked attention still multiplies what the next sequence has not
        overwritten, and 0 x nan is nan."""
        self._cache.keys[:, slot].zero_()
        self._cache.values[:, slot].zero_()

    def _at(self, slot: int) -> _Sequence:
        sequence = self._slots[slot]
        assert sequence is not None
        return sequence

    def _progress(self) -> list[Progress | None]:
        return [None if sequence is None else sequence.progress for sequence in self._slots]

    def _free(self, slot: int) -> _Sequence:
        sequence = self._at(slot)
        self._slots[slot] = None
        self._cache.free(slot)
        return sequence
