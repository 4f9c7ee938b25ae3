"""Tokens of one forward pass: plain arithmetic, for the scorer that measures and the plan that estimates."""

from __future__ import annotations

from typing import Protocol

CPU_TOKEN_BUDGET = 4096
# A trial pass of this many tokens tells how much memory a token takes on CUDA; the budget then leaves a part of the
# free memory alone, for what fragments it and for others, and stops where more tokens bring no more speed.
TRIAL_TOKENS = 4096
USED_SHARE = 0.7
CUDA_MAX_TOKEN_BUDGET = 65536
CUDA_CONTEXT_BYTES = 2**30
"""What a CUDA context and its libraries keep."""
# Several devices in a row are all at work once each has a batch, and idle while the first come and the last go: so a
# call is cut into this many batches a device, of no fewer rows than keep one device busy.
BATCHES_PER_DEVICE = 6
SMALLEST_CUT_ROWS = 2048
PASSES_TO_RECOVER = 32
LONGEST_WAIT_PASSES = 1024


def budget_for(free_bytes: int, bytes_per_token: float) -> int:
    """Tokens of one forward pass that fit a share of the free memory: a multiple of `TRIAL_TOKENS`, or less than it."""
    fits = min(int(USED_SHARE * free_bytes / bytes_per_token), CUDA_MAX_TOKEN_BUDGET)
    return max(1, fits - fits % TRIAL_TOKENS if fits >= TRIAL_TOKENS else fits)


def available_bytes(free_bytes: int, total_bytes: int, own_bytes: int, share: float) -> int:
    """Memory of a device that a process may still take which was given a share of it.

    Whatever others hold now is not free; those with the other shares may not hold theirs yet.

    Args:
        free_bytes: what is free on the device now, whoever holds the rest.
        total_bytes: of the device.
        own_bytes: what this process's tensors hold there.
        share: of this process, up to 1.
    """
    if share >= 1:
        return free_bytes
    return min(free_bytes, int(share * total_bytes) - own_bytes - CUDA_CONTEXT_BYTES)


def cut_for_devices(token_budget: int, num_rows: int, num_devices: int) -> int:
    """Rows of a batch, so that a call of `num_rows` keeps several devices busy, each with some of the layers."""
    if num_devices == 1:
        return token_budget
    even = -(-num_rows // (BATCHES_PER_DEVICE * num_devices))
    return min(token_budget, max(even, SMALLEST_CUT_ROWS))


def waiting_bytes(hidden_size: int, num_devices: int) -> int:
    """Bytes for each token of a batch that those take which wait for a device: residual streams in float32."""
    return 0 if num_devices == 1 else 4 * hidden_size * num_devices


class BudgetRecovery:
    """Brings a token budget back that was lowered when memory lacked: others may have taken it for a while.

    It doubles after `PASSES_TO_RECOVER` passes that filled at least half of it, and if memory lacks again after twice
    as many. A budget that somebody else set meanwhile is left alone.
    """

    def __init__(self) -> None:
        self._goal = 0
        self._budget = 0
        self._fitted = 0
        self._wait = PASSES_TO_RECOVER
        self._has_risen = False

    def lowered(self, before: int, now: int) -> None:
        """Memory lacked with the budget `before`."""
        if before != self._budget:  # not one of ours
            self._goal, self._wait = before, PASSES_TO_RECOVER
        elif self._has_risen:
            self._wait = min(2 * self._wait, LONGEST_WAIT_PASSES)
        self._budget, self._fitted, self._has_risen = now, 0, False

    def after_pass(self, budget: int, num_rows: int) -> int:
        """The budget from now on, when a pass of `num_rows` has fitted."""
        if budget != self._budget or budget >= self._goal or 2 * num_rows < budget:
            return budget
        self._fitted += 1
        if self._fitted >= self._wait:
            self._budget, self._fitted, self._has_risen = min(2 * budget, self._goal), 0, True
        return self._budget


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
