"""PackedBatch -> one score per sequence and its attributes: the forward pass of every supported architecture.

The last layer computes queries, output projection and MLP only where a score is read. What is done row by row runs in
chunks of rows, so that intermediate results stay in a CPU's cache; queries, keys, values and what attention makes of
them live in buffers that are kept between calls, since fresh large tensors cost page faults.

Layers may be spread over several devices: then each has a stage of them, and hands the residual stream on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, Quantization, Window
from serve_app.reward_model.attention import Attention, BlockAttention, attention_for
from serve_app.reward_model.families import Activation
from serve_app.reward_model.handover import Handover, current
from serve_app.reward_model.heads import Head
from serve_app.reward_model.invariance import RowRule
from serve_app.reward_model.linear import (
    Linear,
    MergedLinear,
    gelu_tanh_,
    linear_for,
    merges_products,
    silu_,
    whole_sums,
    with_tiles,
)
from serve_app.reward_model.onednn import PiecewiseLinear, run_serially
from serve_app.reward_model.packing import PackedBatch, on_device
from serve_app.reward_model.prefix_cache import CachedPass, PrefixCache
from serve_app.reward_model.prefixes import Branch
from serve_app.reward_model.rotary import RotaryTable, rotate
from serve_app.reward_model.token_budget import rows_per_key
from serve_app.reward_model.weights import DecoderWeights, LayerWeights

logger = logging.getLogger(__name__)
Outcome = TypeVar("Outcome")


class RowKernels(Protocol):
    """`row_kernels` where it can be had."""

    def add_norm(
        self, hidden_TH: Tensor, added_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor: ...

    def rotate(self, heads_TAD: Tensor, table_TD: Tensor, out_TAD: Tensor) -> None: ...

    def silu_times(self, gate_up_TJ: Tensor) -> Tensor: ...

    def quantized_rows(self, x_TI: Tensor) -> tuple[Tensor, Tensor]: ...


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


_PRODUCTS = ("query", "key_value", "qkv", "output", "gate", "up", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, ready to run. `key_value` gives all key, then all value heads.

    Products of one input are one where that is faster: `qkv`, whose parts are `query` and `key_value`, and `gate_up`.
    Elsewhere these are None, and so are `gate` and `up` where there is `gate_up`.
    """

    attention_norm: Tensor
    query: Linear
    key_value: Linear
    qkv: Linear | None
    output: Linear
    mlp_norm: Tensor
    gate: Linear | None
    up: Linear | None
    gate_up: Linear | None
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
        kernels: RowKernels | None,
    ) -> _Layer:
        quantized = None if kernels is None else kernels.quantized_rows

        def linear(weight: Tensor, bias: Tensor | None) -> Linear:
            return linear_for(weight, bias, quantization=quantization, invariant=invariant, quantized=quantized)

        def apart(weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Linear]:
            biases = [None] * len(sizes) if bias is None else bias.split(sizes)
            return [linear(part, part_bias) for part, part_bias in zip(weight.split(sizes), biases, strict=True)]

        qkv = gate = up = gate_up = None
        if merges_products(layer.qkv, quantization):
            qkv = cast(MergedLinear, linear(layer.qkv, layer.qkv_bias))
            query: Linear = qkv.part(0, config.query_size)
            key_value: Linear = qkv.part(config.query_size, len(layer.qkv))
            gate_up = linear(layer.gate_up, layer.gate_up_bias)
        else:
            query, key_value = apart(layer.qkv, layer.qkv_bias, [config.query_size, 2 * config.kv_size])
            gate, up = apart(layer.gate_up, layer.gate_up_bias, [config.intermediate_size] * 2)
        return cls(
            attention_norm=layer.attention_norm,
            query=query,
            key_value=key_value,
            qkv=qkv,
            output=linear(layer.output, layer.output_bias),
            mlp_norm=layer.mlp_norm,
            gate=gate,
            up=up,
            gate_up=gate_up,
            down=linear(layer.down, layer.down_bias),
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            attention_output_norm=layer.attention_output_norm,
            mlp_output_norm=layer.mlp_output_norm,
            window=window,
        )

    @property
    def linears(self) -> list[Linear]:
        return list(self._products.values())

    @property
    def is_in_pieces(self) -> bool:
        """Whether products are computed in pieces, as on processors with AMX."""
        return any(isinstance(product, PiecewiseLinear) for product in self.linears)

    @property
    def _products(self) -> dict[str, Linear]:
        """The products that the layer has, by their fields."""
        return {name: product for name in _PRODUCTS if (product := getattr(self, name)) is not None}

    def tiled(self, tile_rows: int | None) -> _Layer:
        """The same layer with its products in tiles of so many rows."""
        products: dict[str, Any] = {name: with_tiles(product, tile_rows) for name, product in self._products.items()}
        return replace(self, **products)

    def gated_up(self, normed: Tensor, activation: Activation, kernels: RowKernels | None) -> Tensor:
        """What goes up in the MLP, times its activated gate."""
        if self.gate_up is not None:
            both = self.gate_up(normed)
            if kernels is not None and activation == "silu":
                return kernels.silu_times(both)
            gate, up = both.chunk(2, dim=1)
            activated = (silu_ if activation == "silu" else gelu_tanh_)(gate.contiguous())
            return activated.mul_(up)
        assert self.gate is not None
        assert self.up is not None
        return self.up.times(normed, self.gate.silu(normed) if activation == "silu" else self.gate.gelu_tanh(normed))


class Decoder:
    """A decoder with a head; not thread-safe, since calls share buffers.

    It takes the layers out of `weights` as it lays them out for their devices, so that no two copies are in memory.
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
        self.device_map = weights.device_map
        self.dtype = weights.layers[0].qkv.dtype
        self.row_rule = RowRule.for_device(self.device, invariant=invariant)
        self._norm_weight = weights.norm
        self.head = Head(config.head, weights.head, invariant=invariant)
        # Rounded to the model's dtype, as Transformers has it for Gemma: the square root of 4608 is 68 in bfloat16.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.dtype).item()
        self._invariant = invariant
        self.cached_pass: CachedPass | None = None
        self._stages: list[_Stage] = []
        windows: Iterator[Window] = iter(config.windows or [None] * len(weights.layers))
        for count in self.device_map.num_layers:
            device = weights.layers[0].qkv.device  # with its number, where the map says "cuda"
            with current(device):
                kernels = row_kernels_for(device, self.dtype)
            own = [
                _Layer.of(
                    config,
                    weights.layers.pop(0),
                    quantization,
                    window=next(windows),
                    invariant=invariant,
                    kernels=kernels,
                )
                for _ in range(count)
            ]
            handover = Handover.between(self._stages[-1].device if self._stages else device, device)
            self._stages.append(
                _Stage(config, own, handover, self.row_rule, self.dtype, kernels=kernels, invariant=invariant)
            )

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices of the stages, in their order; one may stand there twice."""
        return tuple(stage.device for stage in self._stages)

    @property
    def linears(self) -> list[Linear]:
        """One layer's matrix products."""
        return self._stages[0].layers[0].linears

    def run_by(self, rule: RowRule) -> None:
        """Pad batches and cut products by another rule from now on."""
        self.row_rule = rule
        self.head.run_by(rule)
        for stage in self._stages:
            stage.row_rule = rule
            stage.layers = [layer.tiled(rule.tile_rows) for layer in stage.layers]

    @property
    def attend(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Attention of rows of queries over keys and values, where it is not PyTorch's own; else None."""
        attention = self._stages[0].attention
        if not isinstance(attention, BlockAttention) or self.config.attention_softcap is None:
            return None
        return partial(attention.kernel, mask=None)

    def weights(self) -> tuple[object, ...]:
        """Every weight, in tensors and dataclasses of tensors."""
        layers = (layer for stage in self._stages for layer in stage.layers)
        return (self.embedding, self._norm_weight, *self.head.tensors(), *layers)

    def release_buffers(self) -> None:
        """Give the memory of the buffers back, as after an out-of-memory error, and what is not finite in them."""
        for stage in self._stages:
            stage.release_buffers()

    @property
    def rows_per_key(self) -> float:
        """What a key counts, in rows, in a batch whose sequences share: see `pack`."""
        gathers = self._stages[0].attention.gathers_keys
        return rows_per_key(self.config) * self.head.num_reads if gathers else 0.0

    def first_read(self, sequence: Sequence[int]) -> int:
        """The first position of a sequence whose hidden state is read: what is before it may come from a cache."""
        return self.head.read_positions(sequence)[0]

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[Sequence[int]], branches: Sequence[Branch], *, cache: PrefixCache | None = None
    ) -> Tensor:
        """Score the branches' sequences in one packed batch.

        Returns float32 on the last device, a row for each branch, in their order: the score, then the attributes of a
        head that has any. Keys and values go to the `cache`, and those that it has of the branches come from it.
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
        with current(self.device):
            hidden = F.embedding(batch.token_ids_T, self.embedding).float()
            if self._embedding_scale != 1.0:
                hidden *= self._embedding_scale
        for stage in self._stages:
            hidden = stage.run(batch, hidden, self.cached_pass, is_last=stage is self._stages[-1])
        with current(hidden.device):
            return self.head(self._stages[-1].norm(hidden, self._norm_weight))


class _Stage:
    """Consecutive layers on one device, and what they need there: attention, rotary angles, kernels and buffers."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: list[_Layer],
        handover: Handover,
        row_rule: RowRule,
        dtype: torch.dtype,
        *,
        kernels: RowKernels | None,
        invariant: bool,
    ) -> None:
        self.config = config
        self.layers = layers
        self.device = handover.target
        self.dtype = dtype
        self.row_rule = row_rule
        self.attention: Attention = attention_for(
            self.device,
            dtype,
            config.head_dim,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            invariant=invariant,
        )
        self._handover = handover
        self._rotary = RotaryTable(config, self.device)
        self._kernels = kernels
        self._buffers: dict[str, Tensor] = {}

    def release_buffers(self) -> None:
        """Forget what is kept between calls."""
        self._buffers.clear()
        self.attention.release_buffers()

    def run(self, batch: PackedBatch, hidden_TH: Tensor, cached: CachedPass | None, *, is_last: bool) -> Tensor:
        """The residual stream behind the stage's layers, on its device; of the last one where scores are read: [N, H].

        The stream is changed in place where it is on this device already. Keys and values of `cached` come from its
        cache and go there.
        """
        with current(self.device):
            hidden_TH = self._handover.bring(hidden_TH)
            table_TD = self._rotary.for_spans(batch.spans, len(hidden_TH))
            self.attention.begin(batch)
            added: Tensor | None = None
            for layer in self.layers[:-1] if is_last else self.layers:
                added = self._layer(layer, hidden_TH, added, table_TD, batch, cached)
            if is_last:
                return self._last_layer(self.layers[-1], hidden_TH, added, table_TD, batch, cached)
            return hidden_TH if added is None else hidden_TH.add_(added)

    def _layer(
        self,
        layer: _Layer,
        hidden_TH: Tensor,
        added_TH: Tensor | None,
        table_TD: Tensor,
        batch: PackedBatch,
        cached: CachedPass | None,
    ) -> Tensor | None:
        """Run a layer on the residual stream, in place.

        `added` is what is still to be added to the stream, which the norm does on its way; so is what comes back.
        """
        config, num_rows = self.config, len(hidden_TH)
        slack = self.attention.slack_rows
        qkv, q, k, v = self._queries_keys_values(
            num_rows + slack, num_rows + batch.num_cached + slack, is_merged=layer.qkv is not None
        )

        def project(rows: slice) -> None:
            normed = self._add_norm(hidden_TH[rows], added_TH, layer.attention_norm)
            if layer.qkv is None:
                self._position(layer.query(normed), layer.query_norm, table_TD[rows], q[rows])
                self._keys_values(layer, normed, table_TD[rows], k[rows], v[rows])
            else:
                self._position_merged(layer, layer.qkv(normed, qkv[rows]), table_TD[rows])

        self._by_chunks(layer, num_rows, project)
        for buffer in (q, k, v) if slack else ():
            buffer[num_rows:] = 0
        if cached is not None:
            cached.exchange(k, v)
        attended = self.attention.attend(self._heads(q), self._heads(k), self._heads(v), window=layer.window)
        attended = attended.view(num_rows, config.query_size)
        left = self._by_chunks(layer, num_rows, lambda rows: self._finish(layer, hidden_TH[rows], attended[rows]))
        return left[-1]

    def _by_chunks(self, layer: _Layer, num_rows: int, compute: Callable[[slice], Outcome]) -> list[Outcome]:
        """What `compute` makes of each chunk of rows, in order.

        Where products are in pieces, chunks run beside each other, each on one thread: the threads wait for each other
        once, and not after each product. Fewer rows leave it to the products to share the threads.
        """
        threads = torch.get_num_threads()
        if layer.is_in_pieces and threads > 1:
            chunks = list(self.row_rule.chunks(num_rows, threads=threads))
            if len(chunks) >= threads:
                return run_serially(compute, chunks)
        return [compute(rows) for rows in self.row_rule.chunks(num_rows)]

    def _queries_keys_values(
        self, num_queries: int, num_keys: int, *, is_merged: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Buffers of a layer's queries, keys and values, and the one of all three, whose columns they are if merged."""
        sizes = [self.config.query_size, self.config.kv_size, self.config.kv_size]
        qkv = self._buffer("qkv", num_keys, sum(sizes) if is_merged else 0)
        if is_merged:
            q, k, v = qkv.split(sizes, dim=1)
            return qkv, q[:num_queries], k, v
        q = self._buffer("q", num_queries, sizes[0])
        k, v = (self._buffer(name, num_keys, size) for name, size in zip("kv", sizes[1:], strict=True))
        return qkv, q, k, v

    def _position_merged(self, layer: _Layer, qkv: Tensor, table_TD: Tensor) -> None:
        """Rotate queries and keys where they are."""
        query, key, _ = qkv.split([self.config.query_size, self.config.kv_size, self.config.kv_size], dim=1)
        parts = [(query, layer.query_norm), (key, layer.key_norm)]
        if layer.query_norm is None and layer.key_norm is None:  # in one launch
            parts = [(qkv[:, : self.config.query_size + self.config.kv_size], None)]
        for part, norm in parts:
            self._position(part, norm, table_TD, part)

    def _last_layer(
        self,
        layer: _Layer,
        hidden_TH: Tensor,
        added_TH: Tensor | None,
        table_TD: Tensor,
        batch: PackedBatch,
        cached: CachedPass | None,
    ) -> Tensor:
        """The residual stream after the last layer, where scores are read: [N, H]."""
        config, num_rows = self.config, len(hidden_TH)
        k, v = (self._buffer(name, num_rows + batch.num_cached, config.kv_size) for name in "kv")

        def project(rows: slice) -> None:
            normed = self._add_norm(hidden_TH[rows], added_TH, layer.attention_norm)
            self._keys_values(layer, normed, table_TD[rows], k[rows], v[rows])

        self._by_chunks(layer, num_rows, project)
        if cached is not None:
            cached.exchange(k, v)
        rows_N = self._score_rows(batch)
        hidden_NH = hidden_TH[rows_N]
        q = self._buffer("q", len(rows_N), config.query_size)
        query = layer.query(self.norm(hidden_NH, layer.attention_norm))
        self._position(query, layer.query_norm, table_TD[rows_N], q)
        attended = self.attention.attend_last(self._heads(q), self._heads(k), self._heads(v), window=layer.window)
        attended = attended.view(len(rows_N), config.query_size)
        for rows in self.row_rule.chunks(len(rows_N)):
            left = self._finish(layer, hidden_NH[rows], attended[rows])
            if left is not None:
                hidden_NH[rows] += left
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

    def _finish(self, layer: _Layer, hidden_TH: Tensor, attended: Tensor) -> Tensor | None:
        """Add the output projection of what was attended to, then the MLP, to rows of the residual stream.

        Where a kernel adds and norms at once, what the MLP gives is left to the next layer's, and returned.
        """
        attended = self._output_normed(layer.output(attended), layer.attention_output_norm)
        normed = self._add_norm(hidden_TH, attended, layer.mlp_norm)
        product = layer.down(layer.gated_up(normed, self.config.activation, self._kernels))
        product = self._output_normed(product, layer.mlp_output_norm)
        if self._kernels is not None and self.row_rule.chunk_rows is None:
            return product
        hidden_TH += product
        return None

    def _output_normed(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """What goes to the residual stream, normed where the architecture does that too (Gemma 2)."""
        return rows if weight is None else self.norm(rows, weight)

    def _position(self, rows: Tensor, norm_weight: Tensor | None, table_TD: Tensor, out: Tensor) -> None:
        """Normalise each head where the architecture does (Qwen3), then rotate it, into `out`."""
        heads_TAD = self._heads(rows)
        if norm_weight is not None:
            heads_TAD = self.norm(heads_TAD, norm_weight)
        (rotate if self._kernels is None else self._kernels.rotate)(heads_TAD, table_TD, self._heads(out))

    def _add_norm(self, hidden_TH: Tensor, added_TH: Tensor | None, weight: Tensor) -> Tensor:
        """RMSNorm of the residual stream after what there is to add was added to it, in place."""
        if self._kernels is not None:
            return self._kernels.add_norm(hidden_TH, added_TH, weight, self.config.rms_eps, self.dtype)
        if added_TH is not None:
            hidden_TH += added_TH
        return self.norm(hidden_TH, weight)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
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
