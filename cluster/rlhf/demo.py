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
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from cluster.connect import connect
from cluster.rlhf.errors import framework_module
from cluster.rlhf.learning import SIGNIFICANT, LearningCurve, save_png, table
from cluster.rlhf.ppo import PpoOptions, train_ppo
from cluster.rlhf.tiny_policy import PROMPTS, policy_tokenizer, random_policy
from cluster.rlhf.trl import RewardFunction
from serve_app.reward_model.errors import RaywardError

__all__ = ["DemoConfig", "demo", "main", "train_grpo"]

logger = logging.getLogger(__name__)
Algorithm: TypeAlias = Literal["grpo", "ppo"]

EXIT_STOPPED, EXIT_NOT_LEARNT = 1, 3
GENERATIONS = 8
LOGGED_EVERY = 10


class DemoConfig(BaseModel):
    """Train tiny policies with rewards of reward actors, and test whether the reward rises."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithms: tuple[Algorithm, ...] = Field(default=("grpo", "ppo"), min_length=1)
    """grpo: TRL's GRPOTrainer; ppo: cluster/rlhf/ppo.py."""
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


def main(algorithms: tuple[Algorithm, ...] = ("grpo", "ppo"), prog: str = "python -m cluster.rlhf.demo") -> int:
    """Run the command line of `prog`; the exit status. `algorithms` are those trained where it names none."""
    config = tyro.cli(DemoConfig, description=__doc__, prog=prog, default=DemoConfig(algorithms=algorithms))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for name in ("httpx", "trl", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|torch|accelerate|transformers)\b")
    try:
        return demo(config)
    except RaywardError as error:
        print(f"the demo stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130


def demo(config: DemoConfig) -> int:
    """Train, print the table and save the picture; the exit status."""
    with connect(config.address):
        from cluster.reward_pool.pool import RewardActorPool  # it imports Ray, for which `connect` sets variables

        with RewardActorPool(config.model, num_actors=config.num_actors, num_cpus=config.cpus_per_actor) as pool:
            trainings = [(algorithm, seed) for algorithm in config.algorithms for seed in config.seeds]
            curves = [_trained(pool, algorithm, seed, config.num_steps) for algorithm, seed in trainings]
    save_png(curves, config.output)
    learnt = all(curve.improvement().p_value < SIGNIFICANT for curve in curves)
    print(f"{table(curves)}\n\nmean rewards of the first and the last steps; the curves are in {config.output}")
    print("every curve rises" if learnt else f"not every curve rises significantly (p < {SIGNIFICANT})")
    return 0 if learnt else EXIT_NOT_LEARNT


def _trained(pool: Any, algorithm: Algorithm, seed: int, num_steps: int) -> LearningCurve:
    if algorithm == "ppo":
        return train_ppo(pool, seed=seed, options=PpoOptions(num_steps=num_steps))
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
