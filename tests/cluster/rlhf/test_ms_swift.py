"""ms-swift's contract as recorded from 4.6.0: `rewards/orm.py`, `rl_core/grpo_algorithm.py`, `utils/utils.py`.

Where ms-swift can be imported, its own registry and reward computation are used; else stand-ins of its classes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import cluster.rlhf.ms_swift as adapter
from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import FrameworkError
from tests.cluster.rlhf.conftest import TOO_LONG, RecordingSource, turns

COLUMNS: dict[str, Any] = {"trainer_state": None, "finish_reason": ["stop", "stop"]}


class ORM:
    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args


class AsyncORM(ORM):
    pass


@pytest.fixture
def orms(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The registry of a stand-in for `swift.rewards.orm`."""
    found: dict[str, type] = {"accuracy": ORM}
    for name, members in {
        "swift": {},
        "swift.rewards": {},
        "swift.rewards.orm": {"ORM": ORM, "AsyncORM": AsyncORM, "orms": found},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_registered_reward_scores_whole_conversations_in_order(
    orms: dict[str, type], source: RecordingSource, asynchronous: bool
) -> None:
    adapter.register("rayward", source=source, asynchronous=asynchronous, on_error="null")
    reward = orms["rayward"](args=object())
    assert inspect.iscoroutinefunction(reward.__call__) is asynchronous
    messages = [turns("a", "b", "c", "de"), turns("a", TOO_LONG)]
    given = reward(["de", TOO_LONG], messages=messages, **COLUMNS)
    assert (asyncio.run(given) if asynchronous else given) == [2.0, None]
    assert source.asked == messages


def test_errors_name_what_is_wrong(orms: dict[str, type], source: RecordingSource) -> None:
    reward = adapter.register("rayward", source=source, asynchronous=False)()
    with pytest.raises(RewardInputError, match="no lists of messages for 1 completions"):
        reward(["a"], **COLUMNS)
    assert reward([], messages=[]) == []
    with pytest.raises(FrameworkError, match="'accuracy' already"):
        adapter.register("accuracy", source=source)


def test_without_ms_swift_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swift.rewards.orm", None)
    with pytest.raises(FrameworkError, match="pip install ms-swift"):
        adapter.register("other")


def test_this_folder_is_refused_as_a_plugin_whose_trl_py_would_stand_for_trl() -> None:
    spec = importlib.util.spec_from_file_location("_swift_external_0", adapter.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(FrameworkError, match="a plugin file of your own"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_ms_swifts_own_computation_uses_the_reward(source: RecordingSource) -> None:
    orm = pytest.importorskip("swift.rewards.orm", reason="ms-swift is not installed")
    data = pytest.importorskip("swift.rl_core.data")
    algorithm = pytest.importorskip("swift.rl_core.grpo_algorithm")
    names = ("rayward_test", "rayward_test_async")
    for asynchronous, name in enumerate(names):
        adapter.register(name, source=source, asynchronous=bool(asynchronous), on_error="null")
    samples = [data.GRPOSample.from_row({"messages": turns("a", text)}) for text in ("b", "cde", TOO_LONG)]
    functions = [orm.orms.pop(name)(args=None) for name in names]
    rewards = algorithm.compute_rewards_per_func(samples, functions, [None] * 2, torch.device("cpu"))
    assert rewards[:2].tolist() == [[1.0, 1.0], [3.0, 3.0]]
    assert bool(rewards[2].isnan().all())
