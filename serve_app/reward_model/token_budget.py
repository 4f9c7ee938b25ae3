"""Tokens of one forward pass: plain arithmetic, for the scorer that measures and the plan that estimates."""

from __future__ import annotations

from typing import Protocol

CPU_TOKEN_BUDGET = 4096
# A trial pass of this many tokens tells how much memory a token takes on CUDA; the budget then leaves a part of the
# free memory alone, for what fragments it and for others, and stops where more tokens bring no more speed.
TRIAL_TOKENS = 4096
USED_SHARE = 0.7
CUDA_MAX_TOKEN_BUDGET = 65536


def budget_for(free_bytes: int, bytes_per_token: float) -> int:
    """Tokens of one forward pass that fit a share of the free memory: a multiple of `TRIAL_TOKENS`, or less than it."""
    fits = min(int(USED_SHARE * free_bytes / bytes_per_token), CUDA_MAX_TOKEN_BUDGET)
    return max(1, fits - fits % TRIAL_TOKENS if fits >= TRIAL_TOKENS else fits)


class LayerSizes(Protocol):
    """Widths of a layer, in values, as `DecoderConfig` has them."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def query_size(self) -> int: ...
    @property
    def kv_size(self) -> int: ...


def rows_per_key(sizes: LayerSizes) -> float:
    """Rows of a pass that take the memory of one copied key and its value.

    A row has a residual stream in float32, its queries and what they attend to, its key and value, and in the MLP the
    gate, the other product and theirs.
    """
    key = 2 * sizes.kv_size
    row = 2 * sizes.hidden_size + 2 * sizes.query_size + key + 3 * sizes.intermediate_size
    return key / row
