"""Bytes of activations that a stage keeps for the backward pass of one microbatch, from shapes alone.

Pure; knows no torch. What autograd saves is what the modules of `model/` save, tensor by tensor: each term below
names its tensor. The idea of counting them, and of what selective recomputation leaves, is Korthikanti et al. 2022's.
N a rank's tokens of a microbatch, B its sequences, T tokens of a whole sequence, H heads, K kv heads, D head dim,
E embed, F ffn, V vocab, X experts, k experts of a token, b bytes of an activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from muster.model import blocks
from muster.model.spec import TransformerSpec
from muster.parallel.layout import Layout

FP32, INT64 = 4, 8
_GROUP_ROWS = 32
"""Rows that experts' groups are rounded up to, see `model/grouped.py`."""
_CHUNK_ROWS, _SOFTMAX_ELEMENTS = 512, 1 << 19
"""Rows whose logits exist at a time, and on a CPU elements of them that are in fp32, see `model/loss.py`."""


@dataclass(frozen=True, slots=True)
class Activations:
    """The bytes of one microbatch of `layout.microbatch` sequences of `sequence` tokens on one rank."""

    spec: TransformerSpec
    layout: Layout
    sequence: int
    activation_bytes: int
    """Bytes of one element: 2 for bf16, 4 for fp32."""
    device: str

    @property
    def tokens(self) -> int:
        """N: of all tensor ranks together."""
        return self.layout.microbatch * self.sequence // self.layout.context

    @property
    def hidden(self) -> int:
        """Hidden states (N, E) between regions, of which sequence parallelism leaves a rank a part."""
        return self._between(self.spec.width * self.activation_bytes)

    @property
    def places_tokens(self) -> bool:
        """Whether each microbatch comes with its tokens' positions."""
        layout = self.layout
        by_sequence = layout.tensor > 1 and layout.sequence_parallel and layout.pipeline > 1
        return layout.context > 1 or by_sequence

    def stage(self, layers: range) -> int:
        """A stage with these layers; the first one has the embedding, the last one norm, head and loss."""
        total = len(layers) * self.block() + (self.angles() if self.places_tokens else 0)
        if layers.start == 0:
            total += self.embedding()
        if layers.stop == self.spec.layers:
            total += self.norm() + self.loss()
        return total

    def block(self) -> int:
        """What is kept of a block from its forward to its backward pass."""
        if self.layout.recompute == "full":
            return self.hidden  # the block's input
        return self._block(self.attend_inputs() if self.layout.recompute == "selective" else self.attend())

    def recomputed(self) -> int:
        """What the backward pass of one block makes again, and holds for its duration."""
        if self.layout.recompute == "full":
            return self._block(self.attend()) - self.hidden
        if self.layout.recompute == "selective":
            return self.attend() - self._shared_inputs()
        return 0

    def _block(self, attend: int) -> int:
        spec, b = self.spec, self.activation_bytes
        H = spec.heads // self.layout.tensor
        total = 2 * self.norm()  # of attention and of the feed-forward block, with their inputs
        total += self.tokens * spec.width * b  # input of q, k and v
        total += self._qk_norm() + attend
        if not self._output_is_view():
            total += self.tokens * H * spec.head_dim * b  # attention's output in the order that o takes
        return total + (self._moe() if spec.experts else self._mlp())

    def norm(self) -> int:
        """A norm's input, and its statistics in fp32: one of RMSNorm, two of LayerNorm."""
        return self.hidden + self._between(self._statistics())

    def _qk_norm(self) -> int:
        if not self.spec.qk_norm:
            return 0
        heads = self.spec.heads // self.layout.tensor + self._kv_heads()
        return self.tokens * heads * (self.spec.head_dim * self.activation_bytes + self._statistics())

    def attend(self) -> int:
        """What the attention itself keeps, by kernel: `model/attend.py`, `parallel/ring.py`, `parallel/ulysses.py`."""
        spec, b, C = self.spec, self.activation_bytes, self.layout.context
        H, K, D = spec.heads // self.layout.tensor, self._kv_heads(), spec.head_dim
        if C > 1 and self.layout.context_kind == "ring":
            # q, out, and the stack of k and v; the log-sum-exp.
            return self.tokens * (2 * (H + K) * D * b + H * FP32)
        tokens, H, K = self.tokens * C, H // C, math.lcm(K, C) // C
        kept = tokens * (H + 2 * K) * D * b  # q, k and v
        if self._is_blocked():
            window = None if spec.window is None or spec.window >= self.sequence else spec.window
            return kept + self.layout.microbatch * H * blocks.kept_scores(self.sequence, window) * b
        return kept + tokens * H * (D * b + FP32)  # out and the log-sum-exp

    def attend_inputs(self) -> int:
        """q, k and v, which selective recomputation keeps in place of the attention's own."""
        heads = self.spec.heads // self.layout.tensor + 2 * self._kv_heads()
        return self.tokens * heads * self.spec.head_dim * self.activation_bytes

    def _shared_inputs(self) -> int:
        """What of `attend_inputs` the attention keeps as it is: all, q alone, or nothing."""
        if self.layout.context == 1:
            return self.attend_inputs()
        if self.layout.context_kind == "ulysses":
            return 0
        H = self.spec.heads // self.layout.tensor
        return self.tokens * H * self.spec.head_dim * self.activation_bytes

    def _mlp(self) -> int:
        return self.tokens * self.activation_bytes * (self.spec.width + self._hidden_widths(self.spec.ffn))

    def _hidden_widths(self, ffn: int) -> int:
        """Of a SwiGLU gate, silu(gate), up and their product; of a GELU what goes in and what comes out."""
        return (4 if self.spec.mlp == "swiglu" else 2) * ffn // self.layout.tensor

    def _moe(self) -> int:
        """With an even load: every expert gets N * k / X rows."""
        spec, b, N = self.spec, self.activation_bytes, self.tokens
        k, E = spec.experts_per_token, spec.width
        # The router's input in fp32, scores, chosen experts, their weights in the type of the output.
        a_token = E * FP32 + spec.experts * FP32 + k * (INT64 + b)
        if spec.router_renormalize:
            a_token += (k + 1) * FP32
        constant = spec.experts * E * FP32 if b != FP32 else 0  # the router's weight in fp32
        if spec.shared_ffn:
            a_token += self._hidden_widths(spec.shared_ffn) * b + (E * b if b != FP32 else 0)
        # Order and places of the rows twice, or four times where they travel; the experts' outputs.
        a_row = (2 if self.layout.expert == 1 else 4) * INT64 + E * b
        rows = N * k
        if self._is_padded(rows):
            a_row += INT64  # places among the padding
            padding = spec.experts // self.layout.expert * (_GROUP_ROWS - 1) // 2
        else:
            padding = 0
        an_expert_row = (E + self._hidden_widths(spec.expert_ffn)) * b  # the experts' inputs, and within them
        return N * a_token + rows * a_row + (rows + padding) * an_expert_row + constant

    def _is_padded(self, rows: int) -> bool:
        experts = self.spec.experts // self.layout.expert
        return self.device == "cpu" and self.activation_bytes == 2 and rows >= 2 * _GROUP_ROWS * experts

    def embedding(self) -> int:
        """Token ids; with the vocabulary divided also their place in it and whether another rank has them."""
        return self.tokens * (INT64 if self.layout.tensor == 1 else INT64 + 1)

    def angles(self) -> int:
        """Rotary cosines and sines in fp32, and where tokens stand: of a microbatch where ranks hold different
        tokens of a sequence (`places_tokens`), else of one sequence, once."""
        tokens = self.tokens if self.places_tokens else self.sequence
        if self.spec.positions == "learned":
            return tokens * INT64
        return tokens * (2 * self.spec.head_dim * FP32 + (INT64 if self.places_tokens else 0))

    def loss(self) -> int:
        """The loss makes its gradients in the forward pass: of the last hidden states (N, E) and of the head (V, E)."""
        vocab = -(-self.spec.vocab // self.layout.tensor)
        return (self.tokens + vocab) * self.spec.width * self.activation_bytes

    def logits(self) -> int:
        """A chunk's logits, and of the rows that are in fp32 at a time their softmax and, under bf16, its input."""
        rows = min(_CHUNK_ROWS, self.tokens)
        vocab = -(-self.spec.vocab // self.layout.tensor)
        exact = rows
        if self.device == "cpu" and self.layout.tensor == 1:
            exact = min(rows, max(_SOFTMAX_ELEMENTS // vocab, 1))
        copies = 1 if self.activation_bytes == FP32 and self.layout.tensor == 1 else 2
        return vocab * (rows * self.activation_bytes + exact * copies * FP32)

    def gradients(self) -> int:
        """Gradients of activations that exist at a time beside what is kept: of hidden states, and two of the
        feed-forward block's inner ones (a third takes the place of the activation that made it)."""
        return 2 * self.hidden + self.tokens * 2 * self._ffn() * self.activation_bytes

    def output_gradients(self) -> int:
        """Gradients of what a block's weights give: of q, k and v, of the feed-forward block within, four of (N, E)."""
        within = (2 if self.spec.mlp == "swiglu" else 1) * self._ffn()
        return self.attend_inputs() + 4 * self.hidden + self.tokens * within * self.activation_bytes

    def _ffn(self) -> int:
        """Hidden widths of the feed-forward block that a token goes through, on this rank."""
        spec = self.spec
        whole = spec.ffn + spec.experts_per_token * spec.expert_ffn + spec.shared_ffn
        return whole // self.layout.tensor

    def _statistics(self) -> int:
        return FP32 if self.spec.norm == "rms" else 2 * FP32

    def _kv_heads(self) -> int:
        return max(self.spec.kv_heads // self.layout.tensor, 1)

    def _is_blocked(self) -> bool:
        return self.device == "cpu" and self.sequence <= blocks.MAX_TOKENS

    def _output_is_view(self) -> bool:
        """The GPU's kernel returns its output, which it keeps, in the order that the next matrix takes."""
        return self.device != "cpu" and self.layout.context == 1 and self.layout.recompute != "selective"

    def _between(self, bytes_of_token: int) -> int:
        divided = self.layout.tensor if self.layout.sequence_parallel else 1
        return self.tokens * bytes_of_token // divided
