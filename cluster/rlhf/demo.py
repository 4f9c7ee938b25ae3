"""Train a tiny policy by reinforcement learning with rewards of reward actors, and test whether the reward rises.

    python -m cluster.rlhf.demo

TRL's GRPOTrainer (needs trl) and the PPO of `cluster/rlhf/ppo.py` each train the embedded generator from several seeds,
on questions of one kind that neither it nor the reward model was trained on. Beside the reward stands what it stands
for: the share of answers that a rule calls right. Where the reward rises and that share falls, the policy has found
answers that the reward model is wrong about; the demo says so. The curves go into a picture (needs matplotlib). Exit
status: 0 every reward rises significantly, 3 one does not, 1 the demo stopped.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import tyro
from pydantic import Field

from cluster.rlhf.errors import framework_module
from cluster.rlhf.learning import LearningCurve, Training, TrainingOptions, run_command, run_trainings
from cluster.rlhf.ppo import train_steps
from cluster.rlhf.tiny_policy import PROMPTS, policy_tokenizer, share_right, taught_policy
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
            max_completion_length=24,
            max_steps=num_steps,
            learning_rate=1.5e-4,
            reward_weights=[1.0, 0.0],  # the rule looks on
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = trl.GRPOTrainer(
            model=taught_policy(),
            reward_funcs=[reward_function, rule],
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows * (num_prompts * num_steps // len(rows) + 1)),
            processing_class=policy_tokenizer(),
            callbacks=[_progress(seed)],
        )
        _train_in_one_thread(trainer)
    rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    shares = [float(entry["rewards/rule/mean"]) for entry in trainer.state.log_history if "reward" in entry]
    return LearningCurve("TRL GRPO", seed, tuple(rewards), tuple(shares))


def rule(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a completion that the rule calls right, else 0, as TRL asks for it."""
    asked, answered = ([turns[-1]["content"] for turns in side] for side in (prompts, completions))
    return [share_right([prompt], [answer]) for prompt, answer in zip(asked, answered, strict=True)]


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
