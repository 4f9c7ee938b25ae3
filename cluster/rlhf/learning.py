"""Trainings of the tiny policy and whether they learnt: mean rewards by step, a test of their rise, a picture."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    """The mean reward of each step's batch, before the step, and the share of its answers that a rule calls right."""

    algorithm: str
    seed: int
    rewards: tuple[float, ...]
    shares: tuple[float, ...] = ()

    def improvement(self, window: int = WINDOW) -> Improvement:
        """A one-sided permutation test of the first against the last `window` steps, of half the steps at most.

        The p-value is (1 + shuffles that rise as much) / (1 + shuffles), with a fixed seed: Phipson and Smyth, 2010.
        Steps of one training depend on each other, so it speaks of this curve, not of others.
        """
        return _improvement(self.rewards, window)

    def right(self, window: int = WINDOW) -> Improvement:
        """The same test of the shares of right answers."""
        return _improvement(self.shares, window)

    @property
    def is_hacked(self) -> bool:
        """Whether the reward rises significantly while the share of right answers falls significantly."""
        if not self.shares or self.improvement().p_value >= SIGNIFICANT:
            return False
        return _improvement([-share for share in self.shares], WINDOW).p_value < SIGNIFICANT


def _improvement(values: Sequence[float], window: int) -> Improvement:
    window = min(window, len(values) // 2)
    first, last = np.array(values[:window]), np.array(values[-window:])
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
    print(*verdicts(curves), sep="\n")
    return 0 if learnt else EXIT_NOT_LEARNT


def verdicts(curves: Sequence[LearningCurve]) -> Iterator[str]:
    """Whether what the reward stands for rose with it."""
    for curve in curves:
        if curve.is_hacked:
            yield (
                f"reward hacking: {curve.algorithm}, seed {curve.seed}: the reward rises and the share of right "
                "answers falls; the policy has found answers that the reward model is wrong about"
            )
    with_shares = [curve.right() for curve in curves if curve.shares]
    risen = sum(found.p_value < SIGNIFICANT for found in with_shares)
    if with_shares:
        yield f"the share of answers that the rule calls right rises in {risen} of {len(with_shares)} trainings"


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
    names = (f"first {window}", f"last {window}", "p", "right first", "last")
    widths = (8, 8, 7, 11, 5)
    head = "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'':10}  {'seed':>4}  {'steps':>5}{head}"]
    for curve in curves:
        found = curve.improvement()
        line = (
            f"{curve.algorithm:10}  {curve.seed:>4}  {len(curve.rewards):>5}  {found.first_mean:>8.3f}  "
            f"{found.last_mean:>8.3f}  {found.p_value:>7.4f}"
        )
        if curve.shares:
            right = curve.right()
            line += f"  {right.first_mean:>11.0%}  {right.last_mean:>5.0%}"
        lines.append(line)
    return "\n".join(lines)


def save_png(curves: Sequence[LearningCurve], path: Path) -> None:
    """Draw the curves. Raises FrameworkError where matplotlib is not installed."""
    figure = framework_module("matplotlib.figure", install="pip install matplotlib").Figure(
        figsize=(11, 4), layout="constrained"
    )
    reward_axes, right_axes = figure.subplots(1, 2)
    for curve in curves:
        steps = range(1, len(curve.rewards) + 1)
        reward_axes.plot(steps, curve.rewards, label=f"{curve.algorithm}, seed {curve.seed}")
        right_axes.plot(steps[: len(curve.shares)], curve.shares)
    reward_axes.set_ylabel("mean reward (raw logit)")
    right_axes.set_ylabel("share of answers that the rule calls right")
    right_axes.set_ylim(0, 1)
    reward_axes.legend()
    for axes in (reward_axes, right_axes):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
