"""verl's contract as recorded from 0.9.1: its `experimental/reward_loop` and `agent_loop`, and `trainer/ppo/reward.py`.

Where verl can be imported, its own loader, base class and DataProto are used too.
"""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cluster.rlhf.verl as adapter
from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import FrameworkError
from cluster.rlhf.rollouts import RolloutScorer
from cluster.rlhf.tiny_policy import policy_tokenizer
from tests.cluster.rlhf.conftest import RecordingSource, chatml, turns


def ids(text: str) -> list[int]:
    found: list[int] = policy_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with the policy's padding, which is its EOS, and their mask."""
    tokenizer = policy_tokenizer()
    filled = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    return filled["input_ids"], filled["attention_mask"]


def trainer_rows(pairs: list[tuple[str, str]]) -> list[SimpleNamespace]:
    """As the trainer's batch has them: prompts padded on the left, responses on the right."""
    prompts, prompt_mask = padded([ids(chatml(turns(prompt))) for prompt, _ in pairs], "left")
    responses, response_mask = padded([ids(response + "<|im_end|>") for _, response in pairs], "right")
    masks = torch.cat([prompt_mask, response_mask], dim=1)
    return [
        SimpleNamespace(
            batch={"prompts": prompts[row], "responses": responses[row], "attention_mask": masks[row]},
            non_tensor_batch={"raw_prompt": np.array(turns(prompt), dtype=object), "__num_turns__": 2},
        )
        for row, (prompt, _) in enumerate(pairs)
    ]


def agent_loop_row(prompt: str, response: str, *, extra: int) -> SimpleNamespace:
    """As the agent loop has it: right-padded prompts, and a mask that is one run of both."""
    prompt_ids, response_ids = ids(chatml(turns(prompt))), ids(response + "<|im_end|>")
    num_real = len(prompt_ids) + len(response_ids)
    return SimpleNamespace(
        batch={
            "prompts": torch.tensor(prompt_ids + [0] * extra),
            "responses": torch.tensor(response_ids + [0] * extra),
            "attention_mask": torch.tensor([1] * num_real + [0] * 2 * extra),
        },
        non_tensor_batch={
            "raw_prompt": turns(prompt),
            "__num_turns__": 2,
            "prompt_len": len(prompt_ids),
            "response_len": len(response_ids),
        },
    )


@pytest.fixture
def scorer(source: RecordingSource) -> RolloutScorer:
    return RolloutScorer(source, policy_tokenizer=policy_tokenizer())


def test_rows_of_the_trainer_and_of_the_agent_loop_are_read_alike(scorer: RolloutScorer) -> None:
    pairs = [("What time is it?", "late"), ("Hi", "a much longer answer")]
    rows = trainer_rows(pairs) + [agent_loop_row(*pair, extra=3) for pair in pairs]
    read = [adapter.sample_conversation(row, scorer) for row in rows]
    assert read == [turns(*pair) for pair in pairs] * 2


def test_an_end_that_the_policy_only_spells_stays(scorer: RolloutScorer) -> None:
    (row,) = trainer_rows([("Hi", "the token </s> and <|im_start|>more")])
    assert adapter.sample_conversation(row, scorer)[-1]["content"] == "the token </s> and <|im_start|>more"


def test_of_several_turns_all_are_read(scorer: RolloutScorer) -> None:
    said = "one<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\ntwo"
    (row,) = trainer_rows([("Hi", said)])
    row.non_tensor_batch["__num_turns__"] = 4
    assert adapter.sample_conversation(row, scorer) == turns("Hi", "one", "Again", "two")


def test_without_raw_prompt_the_error_names_the_option(scorer: RolloutScorer) -> None:
    (row,) = trainer_rows([("Hi", "a")])
    del row.non_tensor_batch["raw_prompt"]
    with pytest.raises(RewardInputError, match="data.return_raw_chat=True"):
        adapter.sample_conversation(row, scorer)


def test_compute_score_wants_the_prompt_in_extra_info(named_source: RecordingSource) -> None:
    adapter._scorer.cache_clear()
    for extra in ({"question": "Hi"}, {"prompt": np.array(turns("Hi"), dtype=object)}):
        given = asyncio.run(adapter.compute_score("any", "abc", None, extra, reward_router_address=None))
        assert given == {"score": 3.0}
    with pytest.raises(RewardInputError, match="RaywardRewardManager"):
        asyncio.run(adapter.compute_score("any", "abc", None, {"index": 3}))
    adapter._scorer.cache_clear()


@pytest.mark.parametrize(
    ("given", "message"), [({"urls": "x"}, "urls"), ({"url": "http://a", "pool": "b"}, "both url and pool")]
)
def test_wrong_settings_are_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(RewardInputError, match=message):
        adapter.settings_of(SimpleNamespace(reward={"reward_kwargs": {"rayward": given}}))


def test_the_trainers_tokenizer_goes_before_one_in_the_settings(named_source: RecordingSource) -> None:
    settings = adapter.settings_of(
        SimpleNamespace(reward={"reward_kwargs": {"rayward": {"policy_tokenizer": "other", "strip_thinking": True}}})
    )
    (row,) = trainer_rows([("Hi", "add</think>late")])
    read = adapter.sample_conversation(row, settings.scorer(policy_tokenizer()))
    assert read == turns("Hi", "late")
    assert settings.scorer().reader.policy_tokenizer == "other"


def test_without_verl_the_manager_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl.experimental.reward_loop.reward_manager.base", None)
    adapter._manager_class.cache_clear()
    with pytest.raises(FrameworkError, match="pip install verl"):
        _ = adapter.RaywardRewardManager
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = adapter.Other


def test_verls_own_loader_and_manager_base_are_used(named_source: RecordingSource) -> None:
    verl = pytest.importorskip("verl", reason="verl is not installed")
    loader = pytest.importorskip("verl.trainer.ppo.reward")
    omegaconf, tensordict = pytest.importorskip("omegaconf"), pytest.importorskip("tensordict")

    pairs = [("What time is it?", "late"), ("Hi", "a longer answer")]
    rows = trainer_rows(pairs)
    batch = {name: torch.stack([row.batch[name] for row in rows]) for name in rows[0].batch}
    raw_prompt = np.empty(len(rows), dtype=object)
    raw_prompt[:] = [list(row.non_tensor_batch["raw_prompt"]) for row in rows]
    data = verl.DataProto(tensordict.TensorDict(batch, batch_size=len(rows)), {"raw_prompt": raw_prompt})
    module = {"path": "pkg://cluster.rlhf.verl"}
    config = omegaconf.OmegaConf.create(
        {
            "reward": {
                "reward_manager": {"source": "importlib", "name": "RaywardRewardManager", "module": module},
                "reward_kwargs": {"rayward": {"url": "http://127.0.0.1:1"}},
            }
        }
    )
    manager = loader.load_reward_manager(config, policy_tokenizer(), reward_router_address=None)

    async def all_rows() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(manager.run_single(data[row : row + 1]) for row in range(len(data)))))

    results = manager.loop.run_until_complete(all_rows())
    scores = [4.0, 15.0]
    assert results == [{"reward_score": score, "reward_extra_info": {"rayward_score": score}} for score in scores]
    placed = loader.resolve_reward_manager_cls(config).assemble_rm_scores(data, scores)
    assert placed.sum(dim=1).tolist() == scores
