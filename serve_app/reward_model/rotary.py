"""Rotary position embedding: angles in float32, as the original computes them, for any of the supported scalings.

Cosines and sines are taken by numpy in float64 on one thread and rounded once, so that they carry the same bits
however many threads and whatever device use them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, RopeConfig
from serve_app.reward_model.packing import Span, on_device


class RotaryTable:
    """Cosine and sine of every position, grown on demand. Shape legend: P positions, D head dimension."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self._config = config
        self._rope = config.rope
        self._device = device
        self._table_PD = torch.empty(0, config.head_dim)

    def for_spans(self, spans: Sequence[Span], num_rows: int) -> Tensor:
        """Cosines then sines of every row's position, float32 [num_rows, D]; those past the spans have position 0.

        A sequence stretched by dynamic scaling is one span alone.
        """
        longest = self._config.longest_unstretched
        stretched = [span for span in spans if longest is not None and span.num_keys > longest]
        positions_T = np.zeros(num_rows, dtype=np.int64)
        for span in spans if not stretched else set(spans).difference(stretched):
            positions_T[span.start : span.stop] = np.arange(span.position, span.num_keys)
        table_PD = self._rows(int(positions_T.max()) + 1)
        rows_TD = table_PD[on_device(torch.from_numpy(positions_T), self._device)]
        for span in stretched:
            rows_TD[span.start : span.stop] = self._of_length(span.num_keys).to(self._device)
        return rows_TD

    def _rows(self, length: int) -> Tensor:
        if len(self._table_PD) < length:
            frequencies_h = _inverse_frequencies(self._rope, self._config.head_dim)
            self._table_PD = _table(frequencies_h, max(256, 2 * length), self._scale).to(self._device)
        return self._table_PD[:length]

    def _of_length(self, length: int) -> Tensor:
        return _table(
            _dynamic_frequencies(self._rope, self._config.head_dim, length, self._config.max_positions), length, 1.0
        )

    @property
    def _scale(self) -> float:
        return self._rope.factor if self._rope.kind == "linear" else 1.0


def rotate(heads_THD: Tensor, table_TD: Tensor, out_THD: Tensor) -> None:
    """Write the rotated queries or keys: the first half of the head pairs with the second. Products are float32.

    `out` may be `heads`.
    """
    half = heads_THD.shape[-1] // 2
    cos_T1H, sin_T1H = table_TD[:, None, :half], table_TD[:, None, half:]
    first, second = heads_THD.float().split(half, dim=-1)
    rotated = (first * cos_T1H).sub_(second * sin_T1H)
    out_THD[..., half:] = (second * cos_T1H).add_(first * sin_T1H)
    out_THD[..., :half] = rotated


def _table(frequencies_h: Tensor, num_positions: int, scale: float) -> Tensor:
    positions_P = np.arange(num_positions, dtype=np.float32) / np.float32(scale)
    angles_Ph = (positions_P[:, None] * frequencies_h.numpy()).astype(np.float64)
    table_PD = np.concatenate([np.cos(angles_Ph), np.sin(angles_Ph)], axis=1)
    return torch.from_numpy(table_PD.astype(np.float32))


def _frequencies(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, length: int, max_positions: int) -> Tensor:
    """NTK-aware base for one length; the formula is that of InternLM2's and Transformers' dynamic scaling."""
    stretch = rope.factor * length / max_positions - (rope.factor - 1)
    return _frequencies(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Frequencies in radians per position; Llama-3's scaling as in Transformers' `modeling_rope_utils`."""
    frequencies = _frequencies(rope.theta, head_dim)
    if rope.kind != "llama3":
        return frequencies
    wavelength = 2 * math.pi / frequencies
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    share = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    scaled = torch.where(wavelength > low, frequencies / rope.factor, frequencies)
    return torch.where((wavelength >= high) & (wavelength <= low), blended, scaled)
