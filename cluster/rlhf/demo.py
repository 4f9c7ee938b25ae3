"""Train a tiny policy by reinforcement learning with rewards of reward actors, and test whether the reward rises.

    python -m cluster.rlhf.demo

TRL's GRPOTrainer (needs trl) and the PPO of `cluster/rlhf/ppo.py` each train a random policy of 0.1 million parameters
from several seeds. The embedded reward model is random too: what is shown is that rewards arrive and steer. The curves
go into a picture (needs matplotlib). Exit status: 0 every curve rises significantly, 3 one does not, 1 the demo
stopped.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from typing import Any, Literal, TypeAlias

import torch
import tyro
from pydantic import Field

from cluster.rlhf.errors import framework_module
from cluster.rlhf.learning import LearningCurve, Training, TrainingOptions, run_command, run_trainings
from cluster.rlhf.ppo import train_steps
from cluster.rlhf.tiny_policy import PROMPTS, policy_tokenizer, random_policy
from cluster.rlhf.trl import RewardFunction

logger = logging.getLogger(__name__)
Algorithm: TypeAlias = Literal["grpo", "ppo"]

GENERATIONS = 8
LOGGED_EVERY = 10


class RlhfDemoConfig(TrainingOptions):
    """Train tiny policies with rewards of reward actors, and test whether the reward rises."""

    algorithms: tuple[Algorithm, ...] = Field(default=("grpo", "ppo"), min_length=1)
    """grpo: TRL's GRPOTrainer; ppo: cluster/rlhf/ppo.py."""


def main() -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(RlhfDemoConfig, description=__doc__, prog="python -m cluster.rlhf.demo")
    return run_command(lambda: demo(config))


def demo(config: RlhfDemoConfig) -> int:
    """Train as `config` says, print the table and save the picture; the exit status."""
    trainings: dict[Algorithm, Training] = {"grpo": _train_grpo_with_pool, "ppo": train_steps}
    return run_trainings(config, [trainings[algorithm] for algorithm in config.algorithms])


def _train_grpo_with_pool(pool: Any, seed: int, num_steps: int) -> LearningCurve:
    return train_grpo(RewardFunction(pool), seed=seed, num_steps=num_steps)


def train_grpo(reward_function: Any, *, seed: int, num_steps: int) -> LearningCurve:
    """Train a tiny policy with TRL's GRPOTrainer; the mean reward of each step's batch.

    Raises:
        FrameworkError: TRL is not installed.
    """
    trl = framework_module("trl", install="pip install trl")
    datasets = framework_module("datasets", install="pip install trl")
    num_prompts = 32 // GENERATIONS
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=num_prompts * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=16,
            max_steps=num_steps,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = trl.GRPOTrainer(
            model=random_policy(seed),
            reward_funcs=reward_function,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows * (num_prompts * num_steps // len(rows) + 1)),
            processing_class=policy_tokenizer(),
            callbacks=[_progress(seed)],
        )
        _train_in_one_thread(trainer)
    rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    return LearningCurve("TRL GRPO", seed, tuple(rewards))


def _train_in_one_thread(trainer: Any) -> None:
    """More threads than one only hinder a model this small, and those of the reward actor."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.train()
    finally:
        torch.set_num_threads(before)


def _progress(seed: int) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
            if logs and "reward" in logs and (state.global_step % LOGGED_EVERY == 0):
                logger.info("grpo seed %d: step %d, reward %.3f", seed, state.global_step, float(logs["reward"]))

    return Progress()


if __name__ == "__main__":
    sys.exit(main())
