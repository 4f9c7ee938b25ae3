"""NeMo-RL's contract as recorded from nemo_rl 0.5: `environments/interfaces.py` and `utils.py`, `rollouts.py`.

NeMo-RL comes from its repository alone (the package of that name on the index is empty), so stand-ins of its modules
with these signatures are used.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import cluster.rlhf.nemo_rl as adapter
from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import FrameworkError
from cluster.rlhf.rollouts import RolloutScorer
from serve_app.reward_model import ConversationError
from tests.cluster.rlhf.conftest import RecordingSource, chatml, turns


class EnvironmentReturn(NamedTuple):
    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[str | None] | None = None


class EnvironmentInterface(abc.ABC):
    @abc.abstractmethod
    def step(self, message_log_batch: list[Any], metadata: list[Any]) -> EnvironmentReturn: ...

    @abc.abstractmethod
    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]: ...


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """The two registries of stand-ins for NeMo-RL's modules."""
    environments: dict[str, str] = {}
    executables: dict[str, str] = {}
    contents: dict[str, dict[str, Any]] = {
        "nemo_rl": {},
        "nemo_rl.environments": {},
        "nemo_rl.distributed": {},
        "nemo_rl.environments.interfaces": {
            "EnvironmentInterface": EnvironmentInterface,
            "EnvironmentReturn": EnvironmentReturn,
        },
        "nemo_rl.environments.utils": {"register_env": environments.__setitem__},
        "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": executables},
        "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": type("PY_EXECUTABLES", (), {"SYSTEM": "system"})},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    adapter._environment_class.cache_clear()
    yield environments, executables
    adapter._environment_class.cache_clear()


def test_the_environment_is_registered_under_the_name_that_it_is_found_by(
    registries: tuple[dict[str, str], dict[str, str]],
) -> None:
    environments, executables = registries
    full_name = adapter.register("rayward")
    assert environments == {"rayward": full_name}
    assert executables == {full_name: "system"}
    module, _, name = full_name.rpartition(".")
    assert hasattr(getattr(sys.modules[module], name), "options")  # NeMo-RL calls .options(...).remote(config)


def test_a_step_gives_rewards_in_order_and_ends_the_episodes(
    registries: tuple[dict[str, str], dict[str, str]], named_source: RecordingSource
) -> None:
    made = adapter.RaywardEnvironment.__ray_metadata__.modified_class
    environment = made({"url": "http://127.0.0.1:1", "enabled": True})
    given = environment.step([turns("a", "bcd"), turns("a", "b")], [{"truth": 1}, None])
    assert torch.equal(given.rewards, torch.tensor([3.0, 1.0]))
    assert given.rewards.dtype == torch.float32
    assert given.terminateds.tolist() == [True, True]
    assert [observation["content"] for observation in given.observations] == ["", ""]
    assert (given.metadata, given.next_stop_strings, given.answers) == ([None] * 2, [None] * 2, ["bcd", "b"])
    batch = {"total_reward": given.rewards}
    metrics = {"rayward/mean_reward": 2.0, "rayward/max_reward": 3.0}
    assert environment.global_post_process_and_metrics(batch) == (batch, metrics)
    assert environment.global_post_process_and_metrics({}) == ({}, {})
    with pytest.raises(RewardInputError, match="urls"):
        made({"urls": "x"})


def test_prompts_that_the_processors_rendered_are_read_back(source: RecordingSource) -> None:
    system = {"role": "system", "content": chatml([{"role": "system", "content": "Be brief."}], opened=False)}
    logs: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": chatml(turns("Hi"))}, {"role": "assistant", "content": "abc"}],
        [system, {"role": "user", "content": chatml(turns("Hi"))}, {"role": "assistant", "content": "ab"}],
        [*turns("Hi", "a", "More"), {"role": "assistant", "content": "a<|im_start|>", "token_ids": torch.ones(3)}],
    ]
    rewards = adapter.rewards(logs, [None] * 3, RolloutScorer(source))
    assert rewards.tolist() == [3.0, 2.0, 13.0]
    brief = {"role": "system", "content": "Be brief."}
    assert source.asked == [turns("Hi", "abc"), [brief, *turns("Hi", "ab")], turns("Hi", "a", "More", "a<|im_start|>")]


def test_logs_that_cannot_be_scored_are_named(source: RecordingSource) -> None:
    scorer = RolloutScorer(source)
    with pytest.raises(RewardInputError, match="1 message logs and 0 metadata"):
        adapter.rewards([turns("a", "b")], [], scorer)
    with pytest.raises(ConversationError, match="item 1: .*assistant's message"):
        adapter.rewards([turns("a", "b"), turns("a")], [None] * 2, scorer)
    several = [{"role": "user", "content": chatml(turns("Hi"))}, *turns("a", "b")[1:], *turns("c", "d")]
    with pytest.raises(ConversationError, match="several answers"):
        adapter.rewards([several], [None], scorer)
    assert adapter.rewards([], [], scorer).shape == (0,)


def test_without_nemo_rl_the_error_says_where_it_comes_from() -> None:
    adapter._environment_class.cache_clear()
    for use in (adapter.register, lambda: adapter.RaywardEnvironment):
        with pytest.raises(FrameworkError, match="from its repository"):
            use()
