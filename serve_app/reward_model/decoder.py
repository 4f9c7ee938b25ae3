"""PackedBatch -> one score per sequence and its attributes: the forward pass of every supported architecture.

The last layer computes queries, output projection and MLP only where a score is read. What is done row by row runs in
chunks of rows, so that intermediate results stay in a CPU's cache; queries, keys, values and what attention makes of
them live in buffers that are kept between calls, since fresh large tensors cost page faults.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, Quantization, Window
from serve_app.reward_model.attention import Attention, BlockAttention, attention_for
from serve_app.reward_model.families import Activation
from serve_app.reward_model.heads import Head
from serve_app.reward_model.invariance import RowRule
from serve_app.reward_model.linear import Linear, linear_for, whole_sums
from serve_app.reward_model.packing import PackedBatch, on_device
from serve_app.reward_model.prefix_cache import CachedPass, PrefixCache
from serve_app.reward_model.prefixes import Branch
from serve_app.reward_model.rotary import RotaryTable, rotate
from serve_app.reward_model.token_budget import rows_per_key
from serve_app.reward_model.weights import DecoderWeights, LayerWeights

logger = logging.getLogger(__name__)


class RowKernels(Protocol):
    """`row_kernels` where it can be had."""

    def add_norm(
        self, hidden_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor: ...

    def rotate(self, heads_TAD: Tensor, table_TD: Tensor, out_TAD: Tensor) -> None: ...

    def silu_times(self, gate_TI: Tensor, up_TI: Tensor) -> Tensor: ...


def row_kernels_for(device: torch.device, dtype: torch.dtype) -> RowKernels | None:
    """Kernels for what is done row by row on CUDA; None, and a warning, where Triton is missing or does not work."""
    if device.type != "cuda":
        return None
    try:
        from serve_app.reward_model import row_kernels

        row_kernels.add_norm(torch.ones(1, 32, device=device), None, torch.ones(32, device=device), 1e-5, dtype)
    except Exception as error:  # no Triton, no compiler, a card it does not know: all of that has plain operations
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("no Triton here (%s): the engine runs without its kernels, which takes longer", reason)
        return None
    return cast(RowKernels, row_kernels)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, ready to run. `key_value` gives all key, then all value heads."""

    attention_norm: Tensor
    query: Linear
    key_value: Linear
    output: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_output_norm: Tensor | None
    mlp_output_norm: Tensor | None
    window: Window

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        layer: LayerWeights,
        quantization: Quantization,
        *,
        window: Window,
        invariant: bool,
    ) -> _Layer:
        def linears(weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> list[Linear]:
            biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
            return [
                linear_for(part, part_bias, quantization=quantization, invariant=invariant)
                for part, part_bias in zip(weight.split(list(sizes)), biases, strict=True)
            ]

        query, key_value = linears(layer.qkv, layer.qkv_bias, [config.query_size, 2 * config.kv_size])
        gate, up = linears(layer.gate_up, layer.gate_up_bias, [config.intermediate_size] * 2)
        (output,) = linears(layer.output, layer.output_bias, [config.hidden_size])
        (down,) = linears(layer.down, layer.down_bias, [config.hidden_size])
        return cls(
            attention_norm=layer.attention_norm,
            query=query,
            key_value=key_value,
            output=output,
            mlp_norm=layer.mlp_norm,
            gate=gate,
            up=up,
            down=down,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            attention_output_norm=layer.attention_output_norm,
            mlp_output_norm=layer.mlp_output_norm,
            window=window,
        )

    @property
    def linears(self) -> list[Linear]:
        return [self.query, self.key_value, self.output, self.gate, self.up, self.down]

    def gated(self, normed: Tensor, activation: Activation) -> Tensor:
        """The MLP's gate, activated."""
        return self.gate.silu(normed) if activation == "silu" else self.gate.gelu_tanh(normed)


class Decoder:
    """A decoder with a head; not thread-safe, since calls share buffers.

    It takes the layers out of `weights` as it lays them out for the device, so that no two copies are in memory.
    `quantization` "fp8" and `invariant` False trade the contract of the scores for speed on CUDA. `cached_pass` is what
    the last pass took from a cache and left there.

    Shape legend: T padded rows, H hidden, Q query heads, K key/value heads, D head dimension, N padded reads, A
    attributes.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        *,
        quantization: Quantization = "none",
        invariant: bool = True,
    ) -> None:
        self.config = config
        self.embedding = weights.embedding
        self.device = weights.embedding.device
        self.dtype = weights.layers[0].qkv.dtype
        self.row_rule = RowRule.for_device(self.device)
        self._norm_weight = weights.norm
        self.head = Head(config.head, weights.head, invariant=invariant)
        layers = weights.layers
        windows: Sequence[Window] = config.windows or [None] * len(layers)
        self._layers = [
            _Layer.of(config, layers.pop(0), quantization, window=window, invariant=invariant) for window in windows
        ]
        self._attention: Attention = attention_for(
            self.device,
            self.dtype,
            config.head_dim,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            invariant=invariant,
        )
        # Rounded to the model's dtype, as Transformers has it for Gemma: the square root of 4608 is 68 in bfloat16.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        self._rotary = RotaryTable(config, self.device)
        self._kernels = row_kernels_for(self.device, self.dtype)
        self._invariant = invariant
        self._buffers: dict[str, Tensor] = {}
        self.cached_pass: CachedPass | None = None

    @property
    def linears(self) -> list[Linear]:
        """One layer's matrix products."""
        return self._layers[0].linears

    @property
    def attend(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Attention of rows of queries over keys and values, where it is not PyTorch's own; else None."""
        if not isinstance(self._attention, BlockAttention) or self.config.attention_softcap is None:
            return None
        return partial(self._attention.kernel, mask=None)

    def weights(self) -> tuple[object, ...]:
        """Every weight, in tensors and dataclasses of tensors."""
        return (self.embedding, self._norm_weight, *self.head.tensors(), *self._layers)

    def release_buffers(self) -> None:
        """Give the memory of the buffers back, as after an out-of-memory error, and what is not finite in them."""
        self._buffers.clear()
        self._attention.release_buffers()

    @property
    def rows_per_key(self) -> float:
        """What a key counts, in rows, in a batch whose sequences share: see `pack`."""
        return rows_per_key(self.config) * self.head.num_reads if self._attention.gathers_keys else 0.0

    def first_read(self, sequence: Sequence[int]) -> int:
        """The first position of a sequence whose hidden state is read: what is before it may come from a cache."""
        return self.head.read_positions(sequence)[0]

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[Sequence[int]], branches: Sequence[Branch], *, cache: PrefixCache | None = None
    ) -> Tensor:
        """Score the branches' sequences in one packed batch.

        Returns float32 on the device, a row for each branch, in their order: the score, then the attributes of a head
        that has any. Keys and values go to the `cache`, and those that it has of the branches come from it.
        """
        self.cached_pass = None
        batch = PackedBatch.build(
            sequences,
            branches,
            padded=self.row_rule.padded,
            device=self.device,
            read_positions=self.head.read_positions if self.head.num_reads > 1 else None,
        )
        if cache is not None:
            self.cached_pass = cache.begin(sequences, batch)
        elif batch.cached:
            raise ValueError("branches with cached tokens need the cache that has them")
        with whole_sums(self.device) if self._invariant else nullcontext():
            return self.forward(batch)[: len(batch.members)]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores and attributes of a packed batch's members, float32 [N, 1 + A]; rows past them mean nothing."""
        table_TD = self._rotary.for_spans(batch.spans, len(batch.token_ids_T))
        self._attention.begin(batch)
        hidden_TH = F.embedding(batch.token_ids_T, self.embedding).float()
        if self._embedding_scale != 1.0:
            hidden_TH *= self._embedding_scale
        for layer in self._layers[:-1]:
            self._layer(layer, hidden_TH, table_TD, batch)
        hidden_NH = self._last_layer(self._layers[-1], hidden_TH, table_TD, batch)
        return self.head(self._norm(hidden_NH, self._norm_weight))

    def _layer(self, layer: _Layer, hidden_TH: Tensor, table_TD: Tensor, batch: PackedBatch) -> None:
        """Run a layer on the residual stream, in place."""
        config, num_rows = self.config, len(hidden_TH)
        slack = self._attention.slack_rows
        q = self._buffer("q", num_rows + slack, config.query_size)
        k, v = (self._buffer(name, num_rows + batch.num_cached + slack, config.kv_size) for name in "kv")
        for rows in self.row_rule.chunks(num_rows):
            normed = self._norm(hidden_TH[rows], layer.attention_norm)
            self._position(layer.query(normed), layer.query_norm, table_TD[rows], q[rows])
            self._keys_values(layer, normed, table_TD[rows], k[rows], v[rows])
        for buffer in (q, k, v) if slack else ():
            buffer[num_rows:] = 0
        if self.cached_pass is not None:
            self.cached_pass.exchange(k, v)
        attended = self._buffer("attended", num_rows, config.query_size)
        attended[batch.num_tokens :] = 0
        self._attention.attend(
            self._heads(q), self._heads(k), self._heads(v), self._heads(attended), window=layer.window
        )
        for rows in self.row_rule.chunks(num_rows):
            self._finish(layer, hidden_TH[rows], attended[rows])

    def _last_layer(self, layer: _Layer, hidden_TH: Tensor, table_TD: Tensor, batch: PackedBatch) -> Tensor:
        """The residual stream after the last layer, where scores are read: [N, H]."""
        config, num_rows = self.config, len(hidden_TH)
        k, v = (self._buffer(name, num_rows + batch.num_cached, config.kv_size) for name in "kv")
        for rows in self.row_rule.chunks(num_rows):
            normed = self._norm(hidden_TH[rows], layer.attention_norm)
            self._keys_values(layer, normed, table_TD[rows], k[rows], v[rows])
        if self.cached_pass is not None:
            self.cached_pass.exchange(k, v)
        rows_N = self._score_rows(batch)
        hidden_NH = hidden_TH[rows_N]
        q, attended = (self._buffer(name, len(rows_N), config.query_size) for name in ("q", "attended"))
        query = layer.query(self._norm(hidden_NH, layer.attention_norm))
        self._position(query, layer.query_norm, table_TD[rows_N], q)
        self._attention.attend_last(
            self._heads(q), self._heads(k), self._heads(v), self._heads(attended), window=layer.window
        )
        for rows in self.row_rule.chunks(len(rows_N)):
            self._finish(layer, hidden_NH[rows], attended[rows])
        return hidden_NH

    def _score_rows(self, batch: PackedBatch) -> Tensor:
        """The rows where hidden states are read, padded with the last one's: int64 [N]."""
        rows = [read.row for read in batch.reads]
        rows += rows[-1:] * (self.row_rule.padded(len(rows)) - len(rows))
        return on_device(torch.tensor(rows), self.device)

    def _keys_values(self, layer: _Layer, normed: Tensor, table_TD: Tensor, k: Tensor, v: Tensor) -> None:
        keys, values = layer.key_value(normed).chunk(2, dim=1)
        self._position(keys, layer.key_norm, table_TD, k)
        v.copy_(values)

    def _finish(self, layer: _Layer, hidden_TH: Tensor, attended: Tensor) -> None:
        """Add the output projection of what was attended to, then the MLP, to rows of the residual stream."""
        attended = self._output_normed(layer.output(attended), layer.attention_output_norm)
        normed = self._add_norm(hidden_TH, attended, layer.mlp_norm)
        product = layer.down(self._gated_up(layer, normed))
        hidden_TH += self._output_normed(product, layer.mlp_output_norm)

    def _gated_up(self, layer: _Layer, normed: Tensor) -> Tensor:
        """What goes up in the MLP, times its activated gate."""
        if self._kernels is not None and self.config.activation == "silu":
            return self._kernels.silu_times(layer.gate(normed), layer.up(normed))
        return layer.up.times(normed, layer.gated(normed, self.config.activation))

    def _output_normed(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """What goes to the residual stream, normed where the architecture does that too (Gemma 2)."""
        return rows if weight is None else self._norm(rows, weight)

    def _position(self, rows: Tensor, norm_weight: Tensor | None, table_TD: Tensor, out: Tensor) -> None:
        """Normalise each head where the architecture does (Qwen3), then rotate it, into `out`."""
        heads_TAD = self._heads(rows)
        if norm_weight is not None:
            heads_TAD = self._norm(heads_TAD, norm_weight)
        (rotate if self._kernels is None else self._kernels.rotate)(heads_TAD, table_TD, self._heads(out))

    def _add_norm(self, hidden_TH: Tensor, added_TH: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of the residual stream after something was added to it, in place."""
        if self._kernels is not None:
            return self._kernels.add_norm(hidden_TH, added_TH, weight, self.config.rms_eps, self.dtype)
        hidden_TH += added_TH
        return self._norm(hidden_TH, weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32 and rounded once."""
        if self._kernels is not None and x.dtype == torch.float32 and x.ndim == 2 and x.is_contiguous():
            return self._kernels.add_norm(x, None, weight, self.config.rms_eps, self.dtype)
        x32 = x.float()
        scale = x32.square().mean(dim=-1, keepdim=True).add_(self.config.rms_eps).rsqrt_()
        return x32.mul(scale).mul_(weight).to(self.dtype)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1, self.config.head_dim)

    def _buffer(self, name: str, num_rows: int, width: int) -> Tensor:
        """A [num_rows, width] tensor that stays in memory between calls; its content is whatever was there."""
        size = num_rows * width
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < size:
            kept = self._buffers[name] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return kept[:size].view(num_rows, width)
