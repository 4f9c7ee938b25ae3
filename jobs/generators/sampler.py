"""Drawing tokens so that each candidate has a seed of its own, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jobs.generators.options import Sampling

__all__ = ["CandidateSampler", "processors"]


class CandidateSampler(LogitsProcessor):
    """Draws the next token of each row and leaves it the only possible one, for a decoder that takes the likeliest.

    Transformers' own sampling draws all rows from one random stream, in which a candidate depends on its neighbours.
    Here row b reads number t of its own stream at step t, and takes the token at which the cumulated probability
    passes it (inverse transform sampling).

    Args:
        seeds: one a row.
        num_steps: the most tokens that will be drawn for a row.
    """

    def __init__(self, seeds: Sequence[int], num_steps: int, *, device: torch.device) -> None:
        streams = [torch.rand(num_steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._drawn_BT = torch.stack(streams).double().to(device)
        self._step = 0
        self.is_finite_B = torch.ones(len(seeds), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated_BV = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        self.is_finite_B &= cumulated_BV[:, -1].isfinite()
        # Every number drawn is below 1, so the token found has a probability above 0.
        passed_B1 = self._drawn_BT[:, self._step, None] * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, passed_B1, right=True).clamp_max_(scores.shape[-1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def processors(
    sampling: Sampling, seeds: Sequence[int], num_steps: int, *, device: torch.device
) -> tuple[LogitsProcessorList, CandidateSampler | None]:
    """What turns logits into the next token: temperature, top k and top p as Transformers does them, then the draw."""
    if sampling.temperature == 0:
        return LogitsProcessorList(), None
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    sampler = CandidateSampler(seeds, num_steps, device=device)
    chain.append(sampler)
    return chain, sampler
