"""TRL's own trainers call the reward functions: TRL 1.16."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.tiny_policy import policy_tokenizer, random_policy
from cluster.rlhf.trl import AsyncRewardFunction, RewardFunction
from serve_app.reward_model import ConversationError, RewardModel
from tests.cluster.rlhf.conftest import TOO_LONG, RecordingSource, chatml, turns


def test_completions_of_both_forms_and_of_one_item_have_rewards_in_order(source: RecordingSource) -> None:
    reward = RewardFunction(source)
    told: dict[str, Any] = {"completion_ids": [[1]], "trainer_state": None, "log_extra": print, "label": ["x"]}
    assert reward(prompts=["Hi"], completions=["abc"], **told) == [3.0]
    conversational = [turns("a", "bc")[1:], turns("a", "b")[1:]]
    assert reward(prompts=[turns("Hi"), turns("Hi")], completions=conversational, **told) == [2.0, 1.0]
    assert source.asked == [turns("Hi", "abc"), turns("Hi", "bc"), turns("Hi", "b")]
    assert reward(prompts=[], completions=[]) == []


def test_functions_pickle_and_one_that_cannot_be_scored_has_none_on_request(source: RecordingSource) -> None:
    reward = pickle.loads(pickle.dumps(RewardFunction(source, name="quality", on_error="null")))
    assert reward.__name__ == "quality"
    assert reward(prompts=["a", "b"], completions=[TOO_LONG, "cd"]) == [None, 2.0]
    with pytest.raises(ConversationError):
        RewardFunction(source)(prompts=["a"], completions=[TOO_LONG])


def test_references_come_from_the_column_that_was_named(source: RecordingSource) -> None:
    reward = pickle.loads(pickle.dumps(RewardFunction(source, reference_column="answer")))
    asked: dict[str, Any] = {"prompts": ["a", "b"], "completions": ["cd", "e"]}
    assert reward(**asked, answer=["x", "y"], label=[1, 2]) == [2.0, 1.0]
    assert reward._scorer._source.references == ["x", "y"]
    with pytest.raises(RewardInputError, match="no column 'answer' for 2 completions; columns: label"):
        reward(**asked, label=[1, 2])
    with pytest.raises(RewardInputError, match="1 references in 'answer' for 2 completions"):
        reward(**asked, answer=["x"])
    lenient = RewardFunction(source, reference_column="answer", on_error="null")
    assert lenient(prompts=["a", "b"], completions=[TOO_LONG, "cd"], answer=["x", "y"]) == [None, 2.0]


def test_trl_tells_the_two_classes_apart(source: RecordingSource) -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    assert utils.is_async_callable(AsyncRewardFunction(source))
    assert not utils.is_async_callable(RewardFunction(source))
    assert utils.get_callable_name(RewardFunction(source, name="quality")) == "quality"


@pytest.mark.filterwarnings("ignore")
def test_rloo_trainer_of_rendered_prompts_gets_the_same_from_both(tiny: RewardModel, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    arguments = trl.RLOOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=2,
        beta=0.0,  # no reference model, which would be loaded by its name
        max_completion_length=4,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.RLOOTrainer(
        model=random_policy(0),
        reward_funcs=[RewardFunction(tiny), AsyncRewardFunction(tiny, name="awaited")],
        args=arguments,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": chatml(turns(text)), "label": text} for text in "abcdefgh"]
        ),
        processing_class=policy_tokenizer(),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["rewards/rayward/mean"] == entry["rewards/awaited/mean"] != 0.0
        assert entry["reward"] == pytest.approx(2 * entry["rewards/rayward/mean"], rel=1e-5)
