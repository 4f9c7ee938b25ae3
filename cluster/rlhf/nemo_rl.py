"""NeMo-RL: an environment whose reward is a reward model's score. Read: NVIDIA-NeMo/RL, nemo_rl 0.5.

Before NeMo-RL makes its environments:

    from cluster.rlhf.nemo_rl import register

    register("rayward")  # then env: {rayward: {url: http://127.0.0.1:8000}}, and task names that map to it

NeMo-RL makes `cls.options(runtime_env=...).remote(config)` of a class found by its name in two registries and calls
`step(message_log_batch, metadata)`. Messages carry role and content alone; the processors put the prompt into them as
the policy's template rendered it, so contents that open a turn are read back. The observation is appended to the
sample's tokens: it is empty. An episode is one turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import framework_module
from cluster.rlhf.rollouts import RolloutReader, RolloutScorer, SourceSettings
from serve_app.reward_model import ConversationError
from serve_app.reward_model.rendered_text import opens_turn

__all__ = ["EnvironmentSettings", "RaywardEnvironment", "log_conversation", "register"]  # noqa: F822  # see below

INSTALL = "NeMo-RL is installed from its repository"


class EnvironmentSettings(SourceSettings):
    """The environment's part of NeMo-RL's configuration."""

    enabled: bool = True
    """NeMo-RL's own switch."""


def register(name: str = "rayward") -> str:
    """Enter the environment into NeMo-RL's registries as `name`; returns its full name.

    Raises:
        FrameworkError: NeMo-RL is not installed.
    """
    executables = framework_module("nemo_rl.distributed.virtual_cluster", install=INSTALL).PY_EXECUTABLES
    registry = framework_module("nemo_rl.distributed.ray_actor_environment_registry", install=INSTALL)
    full_name = f"{__name__}.RaywardEnvironment"
    registry.ACTOR_ENVIRONMENT_REGISTRY[full_name] = executables.SYSTEM
    framework_module("nemo_rl.environments.utils", install=INSTALL).register_env(name, full_name)
    return full_name


def __getattr__(name: str) -> Any:
    """`RaywardEnvironment`, a Ray actor class, made where NeMo-RL asks for it: its base is NeMo-RL's."""
    if name == "RaywardEnvironment":
        return _environment_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _environment_class() -> Any:
    import ray

    interfaces = framework_module("nemo_rl.environments.interfaces", install=INSTALL)

    class RaywardEnvironment(interfaces.EnvironmentInterface):  # type: ignore[misc,name-defined]  # it may not be installed
        """Scores the last message of each log."""

        def __init__(self, config: Mapping[str, Any] | None = None) -> None:
            self._scorer = EnvironmentSettings.of(config or {}, where="the environment's configuration").scorer()

        def step(self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Any]) -> Any:
            rewards_B = rewards(message_log_batch, metadata, self._scorer)
            num_logs = len(message_log_batch)
            return interfaces.EnvironmentReturn(
                observations=[{"role": "environment", "content": ""} for _ in range(num_logs)],
                metadata=[None] * num_logs,
                next_stop_strings=[None] * num_logs,
                rewards=rewards_B,
                terminateds=torch.ones(num_logs, dtype=torch.bool),
                answers=[str(log[-1]["content"]) for log in message_log_batch],
            )

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            found = batch.get("total_reward") if hasattr(batch, "get") else None
            if not isinstance(found, Tensor) or not found.numel():
                return batch, {}
            return batch, {"rayward/mean_reward": float(found.mean()), "rayward/max_reward": float(found.max())}

        def shutdown(self) -> None:
            """Nothing of its own to stop: the source may serve others."""

    return ray.remote(RaywardEnvironment)


def rewards(logs: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Any], scorer: RolloutScorer) -> Tensor:
    """The raw logit of each message log, in order: float32 [B].

    Raises:
        RewardInputError: there are not as many metadata as logs.
        ConversationError: a log cannot be scored; its place is `error.index`.
    """
    if len(metadata) != len(logs):
        raise RewardInputError(f"there are {len(logs)} message logs and {len(metadata)} metadata")
    read = scorer.read_each(len(logs), lambda place: log_conversation(logs[place], scorer.reader))
    return torch.tensor(scorer.all_rewards_of(read), dtype=torch.float32)


def log_conversation(log: Sequence[Mapping[str, Any]], reader: RolloutReader) -> list[dict[str, str]]:
    """The conversation of a message log whose last message is the policy's answer.

    Raises:
        ConversationError: it ends otherwise, or in rendered turns after an earlier answer, which cannot be joined.
    """
    if not log or log[-1].get("role") != "assistant":
        raise ConversationError("the message log does not end in an assistant's message")
    *prompt, answer = log
    if not any(isinstance(message["content"], str) and opens_turn(message["content"]) for message in prompt):
        return reader.conversation([_bare(message) for message in prompt], str(answer["content"]))
    if any(message["role"] == "assistant" for message in prompt):
        raise ConversationError("the message log has rendered prompts and several answers, whose ends are gone")
    return reader.conversation("".join(str(message["content"]) for message in prompt), str(answer["content"]))


def _bare(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"]}
