"""A replica as its requests see it, in one process: what it reads from its prefix cache, and says of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from serve_app.batching.wire import TokenBatch
from serve_app.config import ModelConfig
from serve_app.replica import ReplicaMetrics, RewardReplica
from serve_app.reward_model import ModelSpec, RewardModel


class Replica(RewardReplica):
    """One that nobody drains: its own finaliser is a coroutine, which Serve awaits."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(("kept", "read"), [("auto", [0, 96, 96]), (0, [0, 0, 0])])
def test_candidates_that_come_one_by_one_and_the_tokens_that_metrics_count(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, kept: Any, read: list[int]
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(ReplicaMetrics, "__init__", lambda self, model: None)
    monkeypatch.setattr(ReplicaMetrics, "answered", lambda self, outcomes: None)
    monkeypatch.setattr(
        ReplicaMetrics, "batch", lambda self, report, *, queued_tokens, cached_tokens: counted.append(cached_tokens)
    )
    threads = torch.get_num_threads()  # the process stays as it is
    options = {"model": "tiny", "dtype": "float32", "prefix_cache_bytes": kept, "threads": threads}
    config = ModelConfig.model_validate(options)
    sequences = [[1, *range(100, 200), 7 + place] for place in range(3)]

    async def one_by_one() -> list[float]:
        replica = Replica(config, config.spec("cpu"), 1, ModelSpec.load)
        try:
            replies = [await replica.score(TokenBatch.of([sequence])) for sequence in sequences]
        finally:
            await replica._batcher.close()
        return [reply.scores.tolist()[0] for reply in replies]

    assert asyncio.run(one_by_one()) == tiny.score_token_ids(sequences).tolist()
    assert counted == read
