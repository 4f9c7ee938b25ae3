"""Whether a training learnt: mean rewards by step, a test of their rise, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.rlhf.errors import framework_module

__all__ = ["SIGNIFICANT", "Improvement", "LearningCurve", "save_png", "table"]

WINDOW = 15
NUM_SHUFFLES = 9_999
SIGNIFICANT = 0.01


@dataclass(frozen=True, slots=True)
class Improvement:
    """Mean reward of the first and the last steps, and how often shuffled steps differ as much."""

    first_mean: float
    last_mean: float
    p_value: float


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """The mean reward of each step's batch, before the step."""

    algorithm: str
    seed: int
    rewards: tuple[float, ...]

    def improvement(self, window: int = WINDOW) -> Improvement:
        """A one-sided permutation test of the first against the last `window` steps, of half the steps at most.

        The p-value is (1 + shuffles that rise as much) / (1 + shuffles), with a fixed seed: Phipson and Smyth, 2010.
        Steps of one training depend on each other, so it speaks of this curve, not of others.
        """
        window = min(window, len(self.rewards) // 2)
        first, last = np.array(self.rewards[:window]), np.array(self.rewards[-window:])
        rise = last.mean() - first.mean()
        shuffled = np.random.default_rng(0).permuted(np.tile(np.concatenate([first, last]), (NUM_SHUFFLES, 1)), axis=1)
        rises = shuffled[:, window:].mean(axis=1) - shuffled[:, :window].mean(axis=1)
        p_value = (1 + int((rises >= rise).sum())) / (1 + NUM_SHUFFLES)
        return Improvement(float(first.mean()), float(last.mean()), p_value)


def table(curves: Sequence[LearningCurve]) -> str:
    """A line for each curve."""
    window = min(WINDOW, len(curves[0].rewards) // 2)
    lines = [f"{'':10}  {'seed':>4}  {'steps':>5}  {f'first {window}':>8}  {f'last {window}':>8}  {'p':>7}"]
    for curve in curves:
        found = curve.improvement()
        lines.append(
            f"{curve.algorithm:10}  {curve.seed:>4}  {len(curve.rewards):>5}  {found.first_mean:>8.3f}  "
            f"{found.last_mean:>8.3f}  {found.p_value:>7.4f}"
        )
    return "\n".join(lines)


def save_png(curves: Sequence[LearningCurve], path: Path) -> None:
    """Draw the curves. Raises FrameworkError where matplotlib is not installed."""
    figure = framework_module("matplotlib.figure", install="pip install matplotlib").Figure(
        figsize=(7, 4), layout="constrained"
    )
    axes = figure.subplots()
    for curve in curves:
        axes.plot(range(1, len(curve.rewards) + 1), curve.rewards, label=f"{curve.algorithm}, seed {curve.seed}")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward (raw logit)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
