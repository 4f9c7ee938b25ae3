"""Trainings of the tiny policy and whether they learnt: mean rewards by step, a test of their rise, a picture."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from cluster.connect import connect
from cluster.rlhf.errors import framework_module
from serve_app.reward_model.errors import RaywardError

EXIT_STOPPED, EXIT_NOT_LEARNT = 1, 3

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


Training: TypeAlias = Callable[[Any, int, int], LearningCurve]
"""Trains a policy with the rewards of a pool, from a seed, for a number of steps."""


class TrainingOptions(BaseModel):
    """Train tiny policies with rewards of reward actors, and test whether the reward rises."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: tuple[int, ...] = Field(default=(0, 1), min_length=1)
    """One training each."""
    num_steps: int = Field(default=60, ge=10)
    """Steps of a training, each over one batch of 32 responses."""
    model: str = "tiny"
    """The reward model: a folder, a Hugging Face id, or tiny."""
    num_actors: PositiveInt = 1
    """Reward actors."""
    cpus_per_actor: PositiveInt = 1
    """CPUs of a reward actor, and its threads where it scores on CPU."""
    output: Path = Path("rlhf-curves.png")
    """Where the picture of the curves goes."""
    address: str | None = None
    """A running Ray cluster (auto, host:port or ray://host:port); without it a local one is started."""


def run_trainings(options: TrainingOptions, trainings: Sequence[Training]) -> int:
    """Train by each of `trainings` from every seed, print the table and save the picture.

    The exit status: 0 every curve rises significantly, 3 one does not.
    """
    with connect(options.address):
        from cluster.reward_pool.pool import RewardActorPool  # it imports Ray, for which `connect` sets variables

        with RewardActorPool(options.model, num_actors=options.num_actors, num_cpus=options.cpus_per_actor) as pool:
            curves = [train(pool, seed, options.num_steps) for train in trainings for seed in options.seeds]
    save_png(curves, options.output)
    learnt = all(curve.improvement().p_value < SIGNIFICANT for curve in curves)
    print(f"{table(curves)}\n\nmean rewards of the first and the last steps; the curves are in {options.output}")
    print("every curve rises" if learnt else f"not every curve rises significantly (p < {SIGNIFICANT})")
    return 0 if learnt else EXIT_NOT_LEARNT


def run_command(work: Callable[[], int]) -> int:
    """Run the work of a command line with its log on standard error; the exit status, 1 where it stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in ("httpx", "trl", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|torch|accelerate|transformers)\b")
    try:
        return work()
    except RaywardError as error:
        print(f"the training stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130


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
