"""A reward model in a Serve replica: token ids in, scores out, batched with whatever else waits; and its metrics."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from ray.serve import metrics

from serve_app.autoscaling import QUEUED_SECONDS
from serve_app.batching.admission import Admission
from serve_app.batching.batcher import BatchReport, TokenBatcher
from serve_app.batching.errors import (
    BatcherClosedError,
    BatcherStalledError,
    DeadlineExceededError,
    ForwardError,
    QueueFullError,
)
from serve_app.batching.wire import Refusal, ScoreReply, TokenBatch
from serve_app.config import ModelConfig
from serve_app.reward_model import ModelSpec, RewardModel, ScoringError
from serve_app.reward_model.scores import Outputs
from serve_app.reward_model.spec import ModelFacts
from serve_app.trial import best_rate, on_fewest_threads

TOKEN_BOUNDS = [float(2**power) for power in range(6, 18)]
SECOND_BOUNDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
SHARE_BOUNDS = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5]
# Ray's histograms take positive bounds only, and scores are of both signs: a counter for each range stands for one.
SCORE_BOUNDS = (-10.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)


class ReplicaMetrics:
    """Counters and histograms of one replica. The ranges of scores show a model or its inputs drifting."""

    def __init__(self, model: str) -> None:
        tags = ("model",)
        self._queue = metrics.Gauge("rayward_queue_tokens", "Tokens that wait", tags)
        self._batch_tokens = metrics.Histogram("rayward_batch_tokens", "Tokens of a batch", TOKEN_BOUNDS, tags)
        self._occupancy = metrics.Histogram(
            "rayward_batch_occupancy", "Tokens of a batch, shared ones once, over the budget", SHARE_BOUNDS, tags
        )
        self._wait = metrics.Histogram("rayward_wait_seconds", "A request's wait for its batch", SECOND_BOUNDS, tags)
        self._forward = metrics.Histogram("rayward_forward_seconds", "A batch's forward pass", SECOND_BOUNDS, tags)
        self._scores = metrics.Counter(
            "rayward_scores_total",
            "Scores given, by the upper bound of the range that they are in",
            ("model", "up_to"),  # type: ignore[arg-type]
        )
        self._tokens = metrics.Counter("rayward_tokens_total", "Tokens scored", tags)
        self._cached = metrics.Counter("rayward_cached_tokens_total", "Tokens read from the prefix cache", tags)
        self._conversations = metrics.Counter("rayward_conversations_total", "Conversations scored", tags)
        self._errors = metrics.Counter("rayward_errors_total", "Conversations without a score", ("model", "kind"))  # type: ignore[arg-type]
        every = (self._queue, self._batch_tokens, self._occupancy, self._wait, self._forward, self._scores)
        for metric in (*every, self._tokens, self._cached, self._conversations, self._errors):
            metric.set_default_tags({"model": model})

    def batch(self, report: BatchReport, *, queued_tokens: int, cached_tokens: int = 0) -> None:
        """One batch is done; so many of its tokens were read from the prefix cache."""
        self._queue.set(queued_tokens)
        self._batch_tokens.observe(report.num_tokens)
        self._occupancy.observe(report.occupancy)
        self._forward.observe(report.forward_s)
        for seconds in report.waited_s:
            self._wait.observe(seconds)
        self._tokens.inc(report.num_tokens)
        if cached_tokens:
            self._cached.inc(cached_tokens)

    def answered(self, outcomes: Sequence[Outputs | ScoringError]) -> None:
        """One request's outcomes."""
        scores = [outcome[0] for outcome in outcomes if not isinstance(outcome, ScoringError)]
        for bound, count in Counter(map(_bound, scores)).items():
            self._scores.inc(count, tags={"up_to": bound})
        if scores:
            self._conversations.inc(len(scores))
        for outcome in outcomes:
            if isinstance(outcome, ScoringError):
                self.failed(type(outcome).__name__)

    def failed(self, kind: str, count: int = 1) -> None:
        """So many conversations have no score, or one request was refused, missed its deadline or was cancelled."""
        self._errors.inc(count, tags={"kind": kind})


def _bound(score: float) -> str:
    place = bisect_left(SCORE_BOUNDS, score)
    return f"{SCORE_BOUNDS[place]:g}" if place < len(SCORE_BOUNDS) else "inf"


logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

STALL_AFTER_S = 300.0
Load: TypeAlias = Callable[[ModelSpec], RewardModel]
"""Makes the model of a replica: `ModelSpec.load`, or a test's own."""


class RewardReplica:
    """The deployment's class: one model on one device, and its batcher. `load` makes the model of `spec`."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, num_sharing: int, load: Load) -> None:
        # All that PyTorch does here it does in one thread: a second one would bring a second pool of threads.
        executor = ThreadPoolExecutor(1, thread_name_prefix="device")
        loaded = executor.submit(_Loaded.of, config, spec, num_sharing, load).result()
        self._scorer = scorer = loaded.model.scorer
        self._reported_cached = 0
        self._facts = ModelFacts.of(spec, loaded.model)
        admission = Admission(
            max_queued_tokens=config.max_queued_tokens,
            max_wait_s=config.max_wait_s,
            burst=config.burst,
            guessed_tokens_per_s=loaded.tokens_per_s,
        )
        self._metrics = ReplicaMetrics(config.name)
        self._batcher = TokenBatcher(
            scorer.outputs,
            token_budget=scorer.token_budget,
            admission=admission,
            stall_after_s=STALL_AFTER_S,
            observe=self._observe,
            executor=executor,
        )
        logger.info(
            "%s on %s in %s, %d threads: %d tokens/s in a first trial, budget %d tokens",
            config.name,
            self._facts.device,
            self._facts.dtype,
            loaded.threads,
            loaded.tokens_per_s,
            scorer.token_budget,
        )

    async def score(self, batch: TokenBatch, *, timeout_s: float | None = None, key: str | None = None) -> ScoreReply:
        """Score sequences of token ids; they belong together and run in one batch where they fit.

        Args:
            batch: the sequences.
            timeout_s: how long the caller waits for them to begin.
            key: that of `describe`, from callers that hold on to one model, as a batch job does: after an upgrade to
                another model the batch is refused.
        """
        if key is not None and key != self._facts.key:
            return self._refuse(Refusal("another_model"))
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            outcomes = await self._batcher.submit(batch.lists(), deadline=deadline)
        except QueueFullError as error:
            return self._refuse(Refusal("overloaded", error.retry_after_s))
        except DeadlineExceededError:
            return self._refuse(Refusal("deadline"))
        except (BatcherClosedError, BatcherStalledError):
            return self._refuse(Refusal("unavailable"))
        except ForwardError as error:
            self._metrics.failed(type(error).__name__, batch.num_sequences)
            return ScoreReply.without(error)
        except asyncio.CancelledError:
            self._metrics.failed("cancelled")
            raise
        self._metrics.answered(outcomes)
        return replace(ScoreReply.of(outcomes), processor=self._facts.processor)

    async def score_each(self, batches: Sequence[TokenBatch], timeouts_s: Sequence[float | None]) -> list[ScoreReply]:
        """`score` of several requests that arrived together, each with a queue place and a reply of its own."""
        asked = (self.score(batch, timeout_s=left) for batch, left in zip(batches, timeouts_s, strict=True))
        return await asyncio.gather(*asked)

    async def describe(self) -> ModelFacts:
        """Facts of this replica's model: what decides its scores, and how much it takes at once."""
        return self._facts

    async def ready(self) -> bool:
        """Answers once the model can score: Serve starts a replica's methods after its constructor."""
        return True

    def check_health(self) -> None:
        """For Serve: raises where no progress is made, so that the replica is replaced."""
        self._batcher.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `autoscaling.replicas_for_queue`."""
        return {QUEUED_SECONDS: self._batcher.queued_seconds}

    async def __del__(self) -> None:
        """For Serve, when the replica is drained and stopped, also where its model never loaded."""
        if hasattr(self, "_batcher"):
            await self._batcher.close()

    def _refuse(self, refusal: Refusal) -> ScoreReply:
        self._metrics.failed(refusal.reason)
        return ScoreReply.without(refusal)

    def _observe(self, report: BatchReport) -> None:
        cached = self._scorer.cached_tokens
        self._metrics.batch(
            report, queued_tokens=self._batcher.queued_tokens, cached_tokens=cached - self._reported_cached
        )
        self._reported_cached = cached


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, its tokens per second in a first trial, and the CPU threads that it computes on."""

    model: RewardModel
    tokens_per_s: float
    threads: int

    @classmethod
    def of(cls, config: ModelConfig, spec: ModelSpec, num_sharing: int, load: Load) -> _Loaded:
        """The model of `spec`, for the calling thread.

        On CPU `num_sharing` replicas divide the threads of this machine, of which each takes what it gains by, unless
        the configuration says how many.
        """
        may_choose = config.threads is None and spec.device == "cpu"
        if config.threads is not None or may_choose:
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // num_sharing))
        model = load(spec)
        tokens_per_s = on_fewest_threads(model) if may_choose else best_rate(model)
        return cls(model, tokens_per_s, torch.get_num_threads())
