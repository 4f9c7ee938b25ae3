"""PackedBatch -> one score per sequence: the forward pass of every supported architecture.

The last layer computes queries, output projection and MLP only where a score is read. Large intermediate results
live in buffers that are kept between calls: fresh large tensors cost page faults, up to a tenth of the time on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.attention import Attention, attention_for
from serve_app.reward_model.invariance import RowRule, silu_multiply
from serve_app.reward_model.packing import PackedBatch
from serve_app.reward_model.prefixes import Group
from serve_app.reward_model.rotary import RotaryTable, rotate_

__all__ = ["Decoder", "DecoderWeights", "LayerWeights"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` stacks the rows of all query, then all key, then all value heads; `gate_up` gate over up."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights on one device. Matrices and biases are in the model's dtype; norms and `head` [hidden] are float32.

    `embedding` keeps the checkpoint's dtype: it is only read, so rounding it would cost accuracy and gain nothing.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor


class Decoder:
    """A decoder with a scalar head; not thread-safe, since calls share buffers.

    Shape legend: T padded rows, H hidden, Q query heads, K key/value heads, D head dimension, N padded sequences.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.layers[0].qkv.dtype
        self._attention: Attention = attention_for(self.device, self.dtype, config.head_dim)
        self._rotary = RotaryTable(config, self.device)
        self._buffers: dict[str, Tensor] = {}

    @property
    def row_rule(self) -> RowRule:
        return RowRule.for_device(self.device)

    def matrices(self) -> list[Tensor]:
        """The matrices that tokens are multiplied by, each shape at least once."""
        layer = self.weights.layers[-1]
        query, key_value = layer.qkv.split([self.config.query_size, 2 * self.config.kv_size])
        return [layer.qkv, query, key_value, layer.output, layer.gate_up, layer.down]

    def release_buffers(self) -> None:
        """Give the memory of the buffers back, as after an out-of-memory error."""
        self._buffers.clear()

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], groups: Sequence[Group]) -> Tensor:
        """Score the groups' sequences in one packed batch.

        Returns float32 raw logits on the device, one for each member of the groups, in their order.
        """
        lengths = [len(sequence) for sequence in sequences]
        num_rows = self.row_rule.padded(sum(group.num_rows(lengths) for group in groups))
        batch = PackedBatch.build(sequences, groups, num_rows=num_rows, device=self.device)
        return self.forward(batch)[: len(batch.members)]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores of a packed batch's scored spans, float32 [N]; those past them mean nothing."""
        table_TD = self._rotary.for_spans(batch.spans)
        self._attention.begin(batch)
        hidden_TH = F.embedding(batch.token_ids_T, self.weights.embedding).float()
        for layer in self.weights.layers[:-1]:
            hidden_TH = self._layer(layer, hidden_TH, table_TD, batch)
        hidden_NH = self._last_layer(self.weights.layers[-1], hidden_TH, table_TD, batch)
        normed_NH = self._norm(hidden_NH, self.weights.norm)
        scores_N: Tensor = (normed_NH.float() * self.weights.head).sum(dim=-1)
        return scores_N

    def _layer(self, layer: LayerWeights, hidden_TH: Tensor, table_TD: Tensor, batch: PackedBatch) -> Tensor:
        config = self.config
        normed_TH = self._norm(hidden_TH, layer.attention_norm)
        qkv = self._linear("qkv", normed_TH, layer.qkv, layer.qkv_bias, slack_rows=self._attention.slack_rows)
        q, k, v = qkv.split([config.query_size, config.kv_size, config.kv_size], dim=1)
        q_TQD, k_TKD, v_TKD = (self._heads(rows) for rows in (q, k, v))
        self._position(q_TQD, layer.query_norm, table_TD)
        self._position(k_TKD, layer.key_norm, table_TD)
        attended = self._buffer("attended", len(hidden_TH), config.query_size)
        attended[batch.num_tokens :] = 0
        self._attention.attend(q_TQD, k_TKD, v_TKD, self._heads(attended))
        hidden_TH = hidden_TH.add_(self._linear("hidden", attended, layer.output, layer.output_bias))
        return hidden_TH.add_(self._mlp(layer, hidden_TH))

    def _last_layer(self, layer: LayerWeights, hidden_TH: Tensor, table_TD: Tensor, batch: PackedBatch) -> Tensor:
        config = self.config
        rows_N = self._score_rows(batch)
        normed_TH = self._norm(hidden_TH, layer.attention_norm)
        query_weight, kv_weight = layer.qkv.split([config.query_size, 2 * config.kv_size])
        query_bias, kv_bias = (
            (None, None) if layer.qkv_bias is None else layer.qkv_bias.split([config.query_size, 2 * config.kv_size])
        )
        kv = self._linear("qkv", normed_TH, kv_weight, kv_bias)
        k_TKD, v_TKD = (self._heads(rows) for rows in kv.chunk(2, dim=1))
        q_NQD = self._heads(self._linear("last_query", normed_TH[rows_N], query_weight, query_bias))
        self._position(q_NQD, layer.query_norm, table_TD[rows_N])
        self._position(k_TKD, layer.key_norm, table_TD)
        attended = self._buffer("attended", len(rows_N), config.query_size)
        self._attention.attend_last(q_NQD, k_TKD, v_TKD, self._heads(attended))
        hidden_NH = hidden_TH[rows_N]
        hidden_NH = hidden_NH.add_(self._linear("hidden", attended, layer.output, layer.output_bias))
        return hidden_NH.add_(self._mlp(layer, hidden_NH))

    def _score_rows(self, batch: PackedBatch) -> Tensor:
        """The last row of each scored span, padded with the last one's: int64 [N]."""
        rows = [span.stop - 1 for span in batch.scored]
        rows += rows[-1:] * (self.row_rule.padded(len(rows)) - len(rows))
        return torch.tensor(rows, device=self.device)

    def _mlp(self, layer: LayerWeights, hidden_TH: Tensor) -> Tensor:
        normed_TH = self._norm(hidden_TH, layer.mlp_norm)
        gate_up = self._linear("gate_up", normed_TH, layer.gate_up, layer.gate_up_bias)
        gated = silu_multiply(gate_up, self._buffer("gated", len(hidden_TH), self.config.intermediate_size))
        return self._linear("hidden", gated, layer.down, layer.down_bias)

    def _position(self, heads_TAD: Tensor, norm_weight: Tensor | None, table_TD: Tensor) -> None:
        """Normalise each head where the architecture does (Qwen3), then rotate it, in place."""
        if norm_weight is not None:
            heads_TAD.copy_(self._norm(heads_TAD, norm_weight))
        rotate_(heads_TAD[: len(table_TD)], table_TD)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32 and rounded once."""
        x32 = x.float()
        scale = x32.square().mean(dim=-1, keepdim=True).add_(self.config.rms_eps).rsqrt_()
        return x32.mul(scale).mul_(weight).to(self.dtype)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1, self.config.head_dim)

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, slack_rows: int = 0) -> Tensor:
        """Matrix product into the buffer `name`; with `slack_rows`, that many zero rows follow the result."""
        num_rows = len(x)
        out = self._buffer(name, num_rows + slack_rows, len(weight))
        out[num_rows:] = 0
        self.row_rule.matmul(x, weight, bias, out[:num_rows])
        return out

    def _buffer(self, name: str, num_rows: int, width: int) -> Tensor:
        """A [num_rows, width] tensor that stays in memory between calls; its content is whatever was there."""
        size = num_rows * width
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < size:
            kept = self._buffers[name] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return kept[:size].view(num_rows, width)
