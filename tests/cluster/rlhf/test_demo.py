"""The proof in short: a pool on Ray, TRL's GRPOTrainer and our PPO, one seed and fewer steps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.rlhf.demo import RlhfDemoConfig, demo

NUM_STEPS = 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_policies_learn_from_the_rewards_of_a_pool(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    caplog.set_level(logging.INFO, logger="cluster.rlhf")
    status = demo(RlhfDemoConfig(num_steps=NUM_STEPS, seeds=(0,), output=tmp_path / "curves.png"))
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert [line.split()[:3] for line in printed.splitlines()[1:3]] == [
        ["TRL", "GRPO", "0"],
        ["PPO", "0", str(NUM_STEPS)],
    ]
    assert "every curve rises" in printed
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "grpo seed 0: step 20" in caplog.text
    assert "ppo seed 0: step 20" in caplog.text
