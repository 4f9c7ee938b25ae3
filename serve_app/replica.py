"""A reward model in a Serve replica: token ids in, scores out, batched with whatever else waits; and its metrics."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from ray.serve import metrics

from serve_app.autoscaling import QUEUED_SECONDS
from serve_app.batching.batcher import BatchReport, TokenBatcher
from serve_app.batching.errors import (
    BatcherClosedError,
    BatcherStalledError,
    DeadlineExceededError,
    ForwardError,
    OverloadedError,
)
from serve_app.config import ModelConfig
from serve_app.reward_model import RaywardError, RewardModel
from serve_app.reward_model.checkpoint import fingerprint

__all__ = ["Load", "Refusal", "ReplicaMetrics", "RewardReplica", "ScoreReply", "TokenLists", "load_model"]

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
        self._conversations = metrics.Counter("rayward_conversations_total", "Conversations scored", tags)
        self._errors = metrics.Counter("rayward_errors_total", "Conversations without a score", ("model", "kind"))  # type: ignore[arg-type]
        every = (self._queue, self._batch_tokens, self._occupancy, self._wait, self._forward, self._scores)
        for metric in (*every, self._tokens, self._conversations, self._errors):
            metric.set_default_tags({"model": model})

    def batch(self, report: BatchReport, *, queued_tokens: int) -> None:
        """One batch is done."""
        self._queue.set(queued_tokens)
        self._batch_tokens.observe(report.num_tokens)
        self._occupancy.observe(report.occupancy)
        self._forward.observe(report.forward_s)
        for seconds in report.waited_s:
            self._wait.observe(seconds)
        self._tokens.inc(report.num_tokens)

    def answered(self, values: Sequence[float], errors: Mapping[int, RaywardError]) -> None:
        """One request's scores; those at the places of `errors` are none."""
        scores = [value for place, value in enumerate(values) if place not in errors]
        for bound, count in Counter(map(_bound, scores)).items():
            self._scores.inc(count, tags={"up_to": bound})
        if scores:
            self._conversations.inc(len(scores))
        for error in errors.values():
            self._errors.inc(tags={"kind": type(error).__name__})

    def refused(self, kind: str) -> None:
        """A request was refused, missed its deadline or was cancelled."""
        self._errors.inc(tags={"kind": kind})


def _bound(score: float) -> str:
    place = bisect_left(SCORE_BOUNDS, score)
    return f"{SCORE_BOUNDS[place]:g}" if place < len(SCORE_BOUNDS) else "inf"


logger = logging.getLogger("ray.serve")  # the one whose lines Serve keeps

STALL_S = 300.0
Load: TypeAlias = Callable[[ModelConfig, str], RewardModel]
"""Makes the model of a replica, from its options and its device."""


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Sequences of token ids, end to end: int32 [sum of lengths] and int32 [number of sequences]."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, sequences: list[list[int]]) -> TokenLists:
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
        return cls(np.concatenate([np.array(sequence, dtype=np.int32) for sequence in sequences]), lengths)

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.ids, np.cumsum(self.lengths)[:-1])]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a replica gives no scores: it is `"overloaded"` or `"unavailable"`, the `"deadline"` is past, or it has
    `"another_model"` than the caller asks for.
    """

    reason: Literal["overloaded", "unavailable", "deadline", "another_model"]
    retry_after_s: int = 1


@dataclass(frozen=True, slots=True)
class ScoreReply:
    """A float32 score for each sequence, in order. Those in `errors`, by place, have none."""

    scores: NDArray[np.float32]
    errors: dict[int, RaywardError] = field(default_factory=dict)
    refusal: Refusal | None = None

    @property
    def is_failure(self) -> bool:
        """Whether the forward pass failed for all of the request: another replica may do better."""
        return bool(self.errors) and all(isinstance(error, ForwardError) for error in self.errors.values())


class RewardReplica:
    """The deployment's class: one model on one device, and its batcher. `load` makes the model."""

    def __init__(self, config: ModelConfig, device: str, num_sharing: int, load: Load) -> None:
        # All that PyTorch does here it does in one thread: a second one would bring a second pool of threads.
        executor = ThreadPoolExecutor(1, thread_name_prefix="device")
        model, self._tokens_per_s = executor.submit(_loaded, config, device, num_sharing, load).result()
        scorer = model.scorer
        self._facts = _facts(config, model)
        bound = config.max_queued_tokens or max(2 * scorer.token_budget, int(config.max_wait_s * self._tokens_per_s))
        self._metrics = ReplicaMetrics(config.name)
        self._batcher = TokenBatcher(
            scorer.score,
            token_budget=scorer.token_budget,
            max_queued_tokens=bound,
            stall_after_s=STALL_S,
            observe=self._observe,
            executor=executor,
        )
        logger.info(
            "%s on %s in %s: %d tokens/s, budget %d tokens, at most %d waiting",
            config.name,
            device,
            scorer.decoder.dtype,
            self._tokens_per_s,
            scorer.token_budget,
            bound,
        )

    async def score(self, request: TokenLists, timeout_s: float | None = None) -> ScoreReply:
        """Score sequences of token ids; they belong together and run in one batch where they fit."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            outcomes: Sequence[float | RaywardError] = await self._batcher.submit(request.lists(), deadline=deadline)
        except OverloadedError as error:
            return self._refuse(Refusal("overloaded", error.retry_after_s))
        except DeadlineExceededError:
            return self._refuse(Refusal("deadline"))
        except (BatcherClosedError, BatcherStalledError):
            return self._refuse(Refusal("unavailable"))
        except ForwardError as error:
            outcomes = [error] * len(request.lengths)
        except asyncio.CancelledError:
            self._metrics.refused("cancelled")
            raise
        errors = {place: outcome for place, outcome in enumerate(outcomes) if isinstance(outcome, RaywardError)}
        values = [outcome if isinstance(outcome, float) else 0.0 for outcome in outcomes]
        self._metrics.answered(values, errors)
        return ScoreReply(np.array(values, dtype=np.float32), errors)

    async def score_ids(self, ids: NDArray[np.int32], lengths: NDArray[np.int32], key: str) -> ScoreReply:
        """`score` for callers that hold on to one model, as a batch job does: refused where `key` is not that of
        `describe`, as after an upgrade.
        """
        if key != self._facts["key"]:
            return self._refuse(Refusal("another_model"))
        return await self.score(TokenLists(ids, lengths))

    async def describe(self) -> dict[str, Any]:
        """What decides this replica's scores, with a `key` that stands for it, and how much it takes at once."""
        return self._facts

    async def ready(self) -> bool:
        """Answers once the model can score: Serve starts a replica's methods after its constructor."""
        return True

    def check_health(self) -> None:
        """For Serve: raises where no progress is made, so that the replica is replaced."""
        self._batcher.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `autoscaling.replicas_for_queue`."""
        waiting = self._batcher.queued_tokens + self._batcher.running_tokens
        return {QUEUED_SECONDS: waiting / self._tokens_per_s}

    async def __del__(self) -> None:
        """For Serve, when the replica is drained and stopped."""
        await self._batcher.close()

    def _refuse(self, refusal: Refusal) -> ScoreReply:
        self._metrics.refused(refusal.reason)
        return ScoreReply(np.empty(0, dtype=np.float32), refusal=refusal)

    def _observe(self, report: BatchReport) -> None:
        self._metrics.batch(report, queued_tokens=self._batcher.queued_tokens)


def _facts(config: ModelConfig, model: RewardModel) -> dict[str, Any]:
    """For `RewardReplica.describe`: read once, since files may change under a running replica."""
    deciding = {
        "fingerprint": model.fingerprint,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": config.quantization,
    }
    return {
        **deciding,
        "key": "/".join(deciding.values()),
        "model": config.model,
        "revision": config.revision,
        "tokenizer_fingerprint": fingerprint(model.folder, weights=False, chat_template=model.chat_template),
        "chat_template": model.chat_template,
        "token_budget": model.scorer.token_budget,
    }


def load_model(config: ModelConfig, device: str) -> RewardModel:
    """The model of a replica."""
    return RewardModel.from_pretrained(
        config.model,
        revision=config.revision,
        device=device,
        dtype=config.dtype,
        token_budget=config.token_budget,
        quantization=config.quantization,
        chat_template=config.chat_template,
    )


def _loaded(config: ModelConfig, device: str, num_sharing: int, load: Load) -> tuple[RewardModel, float]:
    """The model, and the tokens per second of a full batch; the trial also warms the device up.

    On CPU `num_sharing` replicas divide the threads of this machine, unless the configuration says how many.
    """
    if device == "cpu" or config.threads is not None:
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // num_sharing))
    model = load(config, device)
    length = min(256, model.config.max_tokens)
    count = max(1, min(model.scorer.token_budget, 4096) // length)
    sequences = [[1 + place] * length for place in range(count)]
    model.scorer.score(sequences)
    started = time.perf_counter()
    model.scorer.score(sequences)
    return model, count * length / (time.perf_counter() - started)
