"""RewardModel: the model card's calls, errors that name the item, memory that runs out, scores that are not finite."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.reward_model import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    DeviceError,
    DeviceMemoryError,
    NonFiniteScoreError,
    RaywardError,
    RewardModel,
    Score,
    TokenIdsError,
)
from serve_app.reward_model import errors as error_module
from serve_app.reward_model.packing import num_rows
from serve_app.reward_model.prefixes import Branch, branch_by_prefix
from tests.conftest import chat

CHATS = [
    chat("Name a prime.", answer) for answer in ("7", "8, I think", "Seventeen is one, and nineteen is another.", "no")
]


def test_a_folder_that_is_missing_is_one_error_that_names_it(tmp_path: Path) -> None:
    for missing in (Path("missing"), tmp_path / "missing", "./missing"):
        with pytest.raises(CheckpointError, match=r"model folder .*missing does not exist; name a folder"):
            RewardModel.from_pretrained(missing)


def test_a_folder_may_be_a_path(tiny: RewardModel) -> None:
    assert RewardModel.from_pretrained(tiny.folder, device="cpu", dtype="float32").get_scores(CHATS) == (
        tiny.get_scores(CHATS)
    )


def test_a_device_that_is_not_there_is_one_error(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="device is 'cuda', but PyTorch finds no GPU.*use device='cpu' or 'auto'"):
        RewardModel.from_pretrained(tiny.folder, device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(DeviceError, match="device is 'cuda:2', but this machine has 2 GPUs"):
        RewardModel.from_pretrained(tiny.folder, device="cuda:2")
    for unknown in ("gpu", "mps", "tpu:0"):
        with pytest.raises(DeviceError, match=f"'cpu', 'cuda' .* not '{unknown}'"):
            RewardModel.from_pretrained(tiny.folder, device=unknown)


def test_scores_are_a_list_whatever_their_number(tiny: RewardModel) -> None:
    assert tiny.get_scores([]) == []
    assert tiny.rank([]) == []
    assert isinstance(tiny.get_scores(CHATS[:1]), list)
    assert isinstance(tiny.get_score(CHATS[0]), float)
    assert tiny.score_token_ids([]).dtype == np.float32


def test_compare_and_rank_agree_with_the_scores(tiny: RewardModel) -> None:
    scores = tiny.get_scores(CHATS)
    better, pair = tiny.compare(CHATS[0], CHATS[1], return_scores=True)
    assert (better, pair) == (scores[0] > scores[1], scores[:2])
    assert tiny.compare(CHATS[0], CHATS[0]) is False
    ranks, ranked = tiny.rank(CHATS, return_scores=True)
    assert ranked == scores
    assert [scores[ranks.index(rank)] for rank in range(4)] == sorted(scores, reverse=True)


def test_score_tells_tokens_and_truncation(tiny: RewardModel) -> None:
    whole, cut = tiny.score([CHATS[0], CHATS[2]], truncation="right", max_tokens=40)
    assert isinstance(whole, Score)
    assert whole.num_tokens == len(tiny.tokenizer.encode(CHATS[0]))
    assert (whole.truncated, cut.truncated, cut.num_tokens) == (False, True, 40)


def test_the_error_of_a_list_names_the_item(tiny: RewardModel) -> None:
    with pytest.raises(ConversationError, match="item 1: message 0 lacks") as caught:
        tiny.get_scores([CHATS[0], [{"role": "user"}], []])
    assert caught.value.index == 1
    with pytest.raises(ConversationTooLongError, match="item 2: conversation has"):
        tiny.score(CHATS, max_tokens=40)


def test_outcomes_keep_the_neighbours_of_a_bad_item(tiny: RewardModel) -> None:
    first, bad, last = tiny.outcomes([CHATS[0], [], CHATS[1]])
    assert isinstance(bad, ConversationError)
    assert [first, last] == tiny.score(CHATS[:2])


def test_long_lists_are_scored_in_order(tiny: RewardModel) -> None:
    """More than are encoded at a time, so that slices meet."""
    conversations = [chat(f"Count to {number}.", "No.") for number in range(600)]
    scores = tiny.get_scores(conversations)
    assert len(set(scores)) > 500
    assert scores[::37] == [tiny.get_score(conversation) for conversation in conversations[::37]]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "empty"),
        ([1, 99999], "token id 99999 is outside"),
        ([-1], "-1"),
        ([1] * 32769, "32769 tokens"),
        ([1.5, 2.0], "integers"),
        ([True], "integers"),
        ([[1, 2]], "integers"),
        (np.array([0.5]), "integers"),
    ],
)
def test_wrong_token_ids_are_refused(tiny: RewardModel, ids: Any, reason: str) -> None:
    with pytest.raises(TokenIdsError, match=f"item 1: .*{reason}"):
        tiny.score_token_ids([[1, 3], ids])


def test_token_ids_come_as_lists_or_arrays(tiny: RewardModel) -> None:
    lists = [[1, 300, 3], [1, 3]]
    assert np.array_equal(tiny.score_token_ids(lists), tiny.score_token_ids([np.array(ids) for ids in lists]))


def test_a_token_outside_the_vocabulary_fails_its_own_conversation(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a tokenizer has more tokens than the model: the index error would end the whole batch."""
    config = tiny.scorer.decoder.config
    beyond, within = chat("you", "7"), chat("a", "7")
    first_outside = max(tiny.tokenizer.encode(beyond))
    assert max(tiny.tokenizer.encode(within)) < first_outside
    expected = tiny.score([within])
    monkeypatch.setattr(tiny.scorer.decoder, "config", replace(config, vocab_size=first_outside))
    bad, good = tiny.outcomes([beyond, within])
    assert isinstance(bad, TokenIdsError)
    assert [good] == expected


def test_one_conversation_in_place_of_a_list_says_so(tiny: RewardModel) -> None:
    with pytest.raises(TypeError, match="a list of conversations is wanted"):
        tiny.get_scores("hello")  # type: ignore[arg-type]


def test_threads_take_turns(tiny: RewardModel) -> None:
    expected = tiny.get_scores(CHATS)
    results: list[list[float]] = []
    workers = [threading.Thread(target=lambda: results.append(tiny.get_scores(CHATS))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 8


def limit_memory(
    monkeypatch: pytest.MonkeyPatch, model: RewardModel, refused: Callable[[list[list[int]]], bool], error: Exception
) -> list[int]:
    """Make forward passes over what is `refused` fail; the list that is returned gets the size of each pass."""
    score, sizes = model.scorer.decoder.score, []
    monkeypatch.setattr(model.scorer, "token_budget", model.scorer.token_budget)  # lowered in the test, put back after

    def limited(sequences: list[list[int]], branches: list[Branch], *, cache: None) -> torch.Tensor:
        members = [sequences[branch.sequence] for branch in branches]
        sizes.append(len(members))
        if refused(members):
            raise error
        return score(sequences, branches, cache=cache)

    monkeypatch.setattr(model.scorer.decoder, "score", limited)
    return sizes


@pytest.mark.parametrize("prompts", ["shared", "apart"])
def test_lack_of_memory_halves_the_batch_and_lowers_the_budget(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, prompts: str
) -> None:
    chats = CHATS if prompts == "shared" else [chat(f"{place}?", "Yes.") for place in "abcd"]
    expected = tiny.get_scores(chats)
    sizes = limit_memory(monkeypatch, tiny, lambda members: len(members) > 2, torch.OutOfMemoryError("too much"))
    released: list[None] = []
    monkeypatch.setattr(tiny.scorer.decoder, "release_buffers", lambda: released.append(None))
    assert tiny.get_scores(chats) == expected
    assert sizes == [4, 2, 2]
    assert released == [None]
    encoded = [tiny.tokenizer.encode(chat) for chat in chats]
    assert tiny.scorer.token_budget == num_rows(branch_by_prefix(encoded), [len(ids) for ids in encoded]) // 2


def test_a_conversation_that_does_not_fit_alone_fails_alone(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.get_scores(CHATS)
    longest = max(len(tiny.tokenizer.encode(conversation)) for conversation in CHATS)
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    limit_memory(monkeypatch, tiny, lambda members: max(map(len, members)) == longest, error)
    outcomes = tiny.outcomes(CHATS)
    assert isinstance(outcomes[2], DeviceMemoryError)
    assert [outcome.value for outcome in outcomes if isinstance(outcome, Score)] == [*expected[:2], expected[3]]


def test_other_errors_of_the_forward_are_not_swallowed(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, tiny, lambda members: True, RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        tiny.get_scores(CHATS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error_of_its_own_conversation(tiny: RewardModel, value: float) -> None:
    """One token's embedding is made non-finite: what it touches fails, its neighbours keep their bits."""
    poison = 500
    clean = [[1, 40, 41, 3], [1, *range(50, 150), 3]]
    expected = tiny.score_token_ids(clean)
    embedding = tiny.scorer.decoder.embedding
    kept = embedding[poison].clone()
    embedding[poison] = value
    try:
        outcomes = tiny.scorer.score([clean[0], [1, poison, 3], clean[1]])
    finally:
        embedding[poison] = kept
    assert isinstance(outcomes[1], NonFiniteScoreError)
    assert [outcomes[0], outcomes[2]] == expected.tolist()
    assert np.array_equal(tiny.score_token_ids(clean), expected)


def test_float16_on_cpu_warns(tiny: RewardModel) -> None:
    with pytest.warns(UserWarning, match="about 15 times slower"):
        model = RewardModel.from_pretrained("tiny", device="cpu", dtype="float16")
    assert model.get_score(CHATS[0]) == pytest.approx(tiny.get_score(CHATS[0]), abs=0.05)


@pytest.mark.parametrize("dtype", ["int8", "half"])
def test_unknown_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype is 'auto' or one of"):
        RewardModel.from_pretrained("tiny", dtype=dtype)


def test_every_error_is_in_the_tree_and_pickles_whole() -> None:
    classes: list[Any] = [kind for kind in vars(error_module).values() if isinstance(kind, type)]
    assert len(classes) > 10
    assert all(issubclass(kind, RaywardError) for kind in classes)
    for kind in classes:
        error = ConversationTooLongError(9, 5) if kind is ConversationTooLongError else kind("why")
        error.index = 3
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert (str(copy), copy.index) == (str(error), 3)
        assert kind.__name__ in str(error_module.__doc__)
