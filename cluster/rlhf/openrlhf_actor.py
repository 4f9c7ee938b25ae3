"""OpenRLHF: rayward's reward actor in the place of its reward model. Read: OpenRLHF 0.11.2.

    python -m cluster.rlhf.openrlhf_actor --reward.model_name_or_path internlm/internlm2-1_8b-reward ...

runs `openrlhf.cli.train_ppo_ray` with these arguments and this actor. OpenRLHF's `RayActorGroup` makes actors by
`actor_class.options(...).remote(world_size, rank, master_addr, master_port)`, loads them by
`init_model_from_pretrained(strategy, pretrain)` and calls `execute_batch("forward", ...)` with lists of `sequences`
(the policy's token ids, padded), `attention_mask` and `pad_sequence`, a micro-batch an entry; results are CPU tensors
[B] of raw logits, which it clips itself (`--reward.clip_range`).

Sequences of ids do not say where the response begins. One in which the policy wrote a turn's marker into its response
cannot be read and ends the training with an error; `openrlhf.py` knows prompt and response apart, and reads all.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import ray

from cluster.reward_pool.actor import RewardActor
from cluster.reward_pool.encoder import Encoding
from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import FrameworkError, framework_module
from serve_app.reward_model import ModelSpec

MAX_CONCURRENCY = 64
"""Calls that wait in an actor at once; OpenRLHF makes one a batch, which scores its micro-batches together."""


class OpenRlhfRewardActor(RewardActor):
    """`RewardActor` with the constructor and the loading call of OpenRLHF's launcher.

    Each rank holds the whole model; ranks do not talk to each other, so the address of the first is never used.
    """

    def __init__(
        self, world_size: int, rank: int, master_addr: str | None = None, master_port: int | None = None
    ) -> None:
        super().__init__()
        self._address = (master_addr or ray.util.get_node_ip_address(), master_port or 0)

    def get_master_addr_port(self) -> tuple[str, int]:
        """Where OpenRLHF tells the other ranks to meet."""
        return self._address

    async def init_model_from_pretrained(self, strategy: Any, pretrain: str) -> None:
        """Load the reward model `pretrain`, in the dtype of its checkpoint on CUDA.

        Raises:
            RewardInputError: `--reward.normalize_enable` is set: it would need statistics that the model has not.
            CheckpointError: the model cannot be loaded.
            PolicyTokenizerError: the policy's tokenizer, of `--actor.model_name_or_path`, cannot be read.
        """
        args = strategy.args
        if args.reward.normalize_enable:
            raise RewardInputError(
                "--reward.normalize_enable is for checkpoints of OpenRLHF's own, with mean and std; leave it out"
            )
        await self.open(ModelSpec(pretrain), Encoding(policy_tokenizer=args.actor.model_name_or_path))


RewardModelActor: Any = ray.remote(max_concurrency=MAX_CONCURRENCY)(OpenRlhfRewardActor)  # type: ignore[call-overload]
"""What stands for `openrlhf.trainer.ray.launcher.RewardModelActor`."""


def main() -> None:
    """Run OpenRLHF's PPO with this process's arguments. Raises FrameworkError where OpenRLHF cannot be imported."""
    launcher = framework_module("openrlhf.trainer.ray.launcher", install="pip install openrlhf[vllm]")
    launcher.RewardModelActor = RewardModelActor
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    try:
        main()
    except FrameworkError as error:
        sys.exit(str(error))
