"""A rise is told from chance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cluster.rlhf.learning import SIGNIFICANT, LearningCurve, save_png, table, verdicts

NOISE = np.random.default_rng(1).normal(size=60)


def curve(slope: float) -> LearningCurve:
    return LearningCurve("PPO", 7, tuple(float(slope * step + NOISE[step]) for step in range(60)))


def test_a_rise_is_significant_and_noise_or_a_fall_is_not() -> None:
    assert curve(0.1).improvement().p_value < SIGNIFICANT < curve(0.0).improvement().p_value
    assert curve(-0.1).improvement().p_value > 0.99
    found = LearningCurve("PPO", 0, (0.0, 1.0, 2.0, 3.0, 4.0)).improvement()
    assert (found.first_mean, found.last_mean) == (0.5, 3.5)


def test_the_p_value_is_the_share_of_orders_that_rise_as_much() -> None:
    # Of the six ways to choose two of four, one puts 3 and 4 last.
    assert LearningCurve("PPO", 0, (1.0, 2.0, 3.0, 4.0)).improvement().p_value == pytest.approx(1 / 6, abs=0.02)


def test_a_reward_that_rises_while_right_answers_fall_is_called_hacking() -> None:
    shares = tuple(0.5 + 0.005 * step + 0.02 * noise for step, noise in enumerate(NOISE.tolist()))
    risen = dataclasses.replace(curve(0.1), shares=shares)
    hacked = dataclasses.replace(curve(0.1), shares=shares[::-1])
    flat = dataclasses.replace(curve(0.0), shares=shares[::-1])
    assert [each.is_hacked for each in (risen, hacked, flat, curve(0.1))] == [False, True, False, False]
    told = list(verdicts([risen, hacked]))
    assert told[0].startswith("reward hacking: PPO, seed 7: ")
    assert told[1:] == ["the share of answers that the rule calls right rises in 1 of 2 trainings"]
    assert "right first" in table([risen])
    assert not list(verdicts([curve(0.1)]))


def test_the_table_and_the_picture_have_every_curve(tmp_path: Path) -> None:
    lines = table([curve(0.1), curve(0.0)]).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["PPO", "7", "60"]
    pytest.importorskip("matplotlib")
    save_png([curve(0.1)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
