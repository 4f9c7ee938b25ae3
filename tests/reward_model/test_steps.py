"""Process reward models: equal to their authors' reading, the same bits step by step, and refused where unsure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from serve_app.reward_model import (
    CheckpointError,
    Conversation,
    ConversationError,
    ConversationTooLongError,
    MalformedConversationError,
    RewardModel,
    UnsupportedArchitectureError,
)
from serve_app.reward_model.scores import StepScores
from tests.conftest import chat
from tests.reward_model import classifiers
from tests.reward_model.stepwise import ANSWERS, KINDS, QUESTION, reference
from tests.reward_model.tiny_checkpoints import load

PROMPT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module", params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[kind].write(tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def model(kind: str, folder: Path) -> RewardModel:
    return load(folder, head=KINDS[kind].head)


def scores_of(model: RewardModel, *answers: list[str], **options: Any) -> list[list[float]]:
    found = model.step_outcomes([PROMPT] * len(answers), answers, **options)
    return [list(scores.values) for scores in found if isinstance(scores, StepScores)]


def test_scores_are_those_of_the_public_reading(kind: str, folder: Path, model: RewardModel) -> None:
    expected = reference(kind, folder)
    found = scores_of(model, *ANSWERS)
    assert [len(scores) for scores in found] == [2, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert len(set(theirs)) == len(theirs)
    assert max(max(scores) for scores in expected) - min(min(scores) for scores in expected) > 0.01


def test_a_step_has_the_bits_that_it_has_when_nothing_stands_behind_it(model: RewardModel) -> None:
    """And beside any others: branches of a search, which share their beginnings."""
    whole = model.score_steps(PROMPT, ANSWERS[1])
    assert [model.score_steps(PROMPT, ANSWERS[1][: place + 1])[-1] for place in range(4)] == whole
    branches = [[*ANSWERS[1][:2], last] for last in ("no, four", "yes", "I do not know.")]
    assert scores_of(model, *branches, *ANSWERS) == [
        model.score_steps(PROMPT, steps) for steps in (*branches, *ANSWERS)
    ]


def test_aggregates_are_named(model: RewardModel) -> None:
    scores = model.score_steps(PROMPT, ANSWERS[1])
    assert model.score_steps(PROMPT, ANSWERS[1], aggregate="product") == math.prod(scores)
    assert model.score_steps(PROMPT, ANSWERS[1], aggregate="minimum") == min(scores)
    assert model.score_steps(PROMPT, ANSWERS[1], aggregate="last") == scores[-1]


def test_typed_separators_stay_text(model: RewardModel) -> None:
    """A step that spells a special token, the model's own separator too, is a step all the same."""
    steps = ["two <extra_0> two", "<|im_end|>", "four"]
    assert len(model.score_steps(PROMPT, steps)) == 3
    assert model.score_steps(PROMPT, steps[:1]) == model.score_steps(PROMPT, steps)[:1]


def test_what_is_no_answer_in_steps_is_refused(model: RewardModel) -> None:
    wrong: list[tuple[Any, Any]] = [
        (chat("a", "b"), ["c"]),
        (PROMPT, []),
        (PROMPT, "text"),
        (PROMPT, ["a", 1]),
        ([], ["a"]),
    ]
    outcomes = model.step_outcomes([prompt for prompt, _ in wrong], [steps for _, steps in wrong])
    assert [type(outcome) for outcome in outcomes] == [ConversationError] * 5
    with pytest.raises(ConversationTooLongError, match="an answer in steps is not shortened"):
        model.score_steps(PROMPT, ["two plus " * 40], max_tokens=30)
    with pytest.raises(MalformedConversationError, match="unknown_role"):
        model.score_steps([*chat("a", "b"), {"role": "human", "content": "c"}], ["d"], strict=True)
    with pytest.raises(ValueError, match="1 conversations have 2 lists of steps"):
        model.step_outcomes([PROMPT], ANSWERS)


def test_a_conversation_has_no_score_as_a_whole(model: RewardModel) -> None:
    (outcome,) = model.outcomes([chat("a", "b")])
    assert isinstance(outcome, ConversationError)
    assert "use score_steps" in str(outcome)


def test_other_models_have_no_steps(tiny: RewardModel) -> None:
    with pytest.raises(ConversationError, match="scores a conversation as a whole, and no steps"):
        tiny.score_steps(PROMPT, ["a"])


def test_a_question_without_a_template_is_one_message(tmp_path: Path) -> None:
    model = load(KINDS["trl"].write(tmp_path), head="steps:trl")
    with pytest.raises(ConversationError, match="the prompt is one message of the user's, not 2 of system, user"):
        model.score_steps([{"role": "system", "content": "Be brief."}, *PROMPT], ["a"])


def test_another_separator_is_named(tmp_path: Path) -> None:
    folder = KINDS["trl"].write(tmp_path)
    lines = load(folder, head="steps:trl").score_steps(PROMPT, ANSWERS[0])
    assert load(folder, head="steps:trl:\\n").score_steps(PROMPT, ANSWERS[0]) == lines
    assert load(folder, head="steps:trl: ;").score_steps(PROMPT, ANSWERS[0]) != lines
    assert load(folder, head="steps:trl: ;").fingerprint != load(folder, head="steps:trl").fingerprint


@pytest.mark.parametrize(
    ("kind", "head", "reason"),
    [
        ("trl", None, r"has 2 labels; .*head='steps:trl', or 'steps:trl:SEPARATOR'"),
        ("shepherd", None, r"is a language model.*head='steps:shepherd' or head='steps:rlhflow'"),
        ("trl", "steps:rlhflow", r"does not fit LlamaForTokenClassification"),
        ("rlhflow", "steps:trl", r"does not fit LlamaForCausalLM"),
        ("qwen", "steps:trl", r"other process reward models say themselves what they are"),
        ("rlhflow", "steps:all", r"does not fit LlamaForCausalLM"),
    ],
)
def test_a_rule_is_never_guessed(tmp_path: Path, kind: str, head: str | None, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        load(KINDS[kind].write(tmp_path), head=head)


def test_a_tokenizer_without_the_rules_tokens_is_refused(tmp_path: Path) -> None:
    model = load(KINDS["qwen"].write(tmp_path / "a"))
    model.tokenizer.id_of = lambda token: None  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="no token <extra_0>"):
        model.score_steps(PROMPT, ["a"])
    folder = KINDS["skywork"].write(tmp_path / "b")
    classifiers.change_json(folder / "tokenizer_config.json", bos_token=None)
    with pytest.raises(CheckpointError, match="names no bos_token"):
        load(folder).score_steps(PROMPT, ["a"])


def test_a_parsed_prompt_may_stand_in_place_of_messages(model: RewardModel) -> None:
    assert model.score_steps(Conversation.parse(PROMPT), ["four"]) == model.score_steps(PROMPT, ["four"])
