"""What a replica tells Prometheus, through Ray's metrics. Names begin with `rayward_`; every one carries `model`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from ray.serve import metrics

from serve_app.batcher import BatchReport
from serve_app.reward_model import RaywardError

__all__ = ["ReplicaMetrics"]

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
