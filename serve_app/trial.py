"""A model's first trial in its replica: the tokens per second that it does, and how many CPU threads are worth having.

PyTorch's threads wait for each other by spinning. A small model that two of them make a tenth faster takes two cores
all the same, which the processes beside it then lack: those that speak HTTP and tokenise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from serve_app.reward_model import RewardModel

TRIAL_TOKENS, SEQUENCE_TOKENS = 4096, 256
SHARE_OF_BEST = 0.8
"""Half the threads are enough where they give this share of the rate."""
LONG_PASS_S = 0.5
"""A model that takes longer for a trial pass is one whose products are large enough for all threads."""
PASSES = 3
"""The best of so many counts: what runs beside them slows several threads more than one."""


def best_rate(model: RewardModel, *, passes: int = 1) -> float:
    """The tokens per second of the fastest of some trial passes, after one that warms the device up."""
    length = min(SEQUENCE_TOKENS, model.config.max_tokens)
    count = max(1, min(model.scorer.token_budget, TRIAL_TOKENS) // length)
    sequences = [[1 + place] * length for place in range(count)]
    shares, model.scorer.share_prompts = model.scorer.share_prompts, False  # a repeated pass would read next to nothing
    try:
        model.scorer.score(sequences)
        return max(count * length / _seconds(lambda: model.scorer.score(sequences)) for _ in range(passes))
    finally:
        model.scorer.share_prompts = shares


def on_fewest_threads(model: RewardModel) -> float:
    """Let the calling thread compute on as few of its CPU threads as `model` gains by; its tokens per second then."""

    def rate_with(threads: int) -> float:
        torch.set_num_threads(threads)
        return best_rate(model, passes=PASSES)

    most, rate = torch.get_num_threads(), best_rate(model)
    if most > 1 and TRIAL_TOKENS / rate < LONG_PASS_S:
        threads, rate = fewest_threads(rate_with, most)
        torch.set_num_threads(threads)
    return rate


def fewest_threads(rate_with: Callable[[int], float], most: int) -> tuple[int, float]:
    """How many of up to `most` threads to take, and their rate: half as many again and again, while these give
    `SHARE_OF_BEST` of the best rate.
    """
    threads, best = most, rate_with(most)
    rate = best
    while threads > 1:
        fewer_rate = rate_with(threads // 2)
        best = max(best, fewer_rate)
        if fewer_rate < SHARE_OF_BEST * best:
            break
        threads, rate = threads // 2, fewer_rate
    return threads, rate


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
