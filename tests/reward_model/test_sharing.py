"""Prompts computed once give the same bits as prompts computed for every answer, on real conversations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from serve_app.reward_model import Conversation, ConversationError, ConversationTooLongError, RewardModel, Score
from serve_app.reward_model.onednn import OneDnnLinear
from serve_app.reward_model.prefixes import MIN_SHARED_TOKENS
from tests.conftest import chat


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    name = {"float32": "tiny", "bfloat16": "tiny_bf16"}[request.param]
    reward_model: RewardModel = request.getfixturevalue(name)
    monkeypatch.setattr(reward_model.scorer, "token_budget", reward_model.scorer.token_budget)
    monkeypatch.setattr(reward_model.scorer, "share_prompts", True)
    return reward_model


@pytest.fixture
def fast_model(model: RewardModel) -> RewardModel:
    """For many tokens: without the processor's own bfloat16 products a page of text takes a minute."""
    if not OneDnnLinear.supports(torch.empty(0, dtype=model.dtype)):
        pytest.skip(f"oneDNN has no {model.dtype} products on this processor")
    return model


def rows_read(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens each forward pass reads."""
    forward, rows = model.scorer.decoder.forward, []

    def counted(batch: Any) -> torch.Tensor:
        rows.append(batch.num_tokens)
        return forward(batch)

    monkeypatch.setattr(model.scorer.decoder, "forward", counted)
    return rows


def both_ways(model: RewardModel, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Tokens read with sharing and without; the scores must have the same bits."""
    rows = rows_read(model, monkeypatch)
    shared = model.score_token_ids(sequences)
    num_shared = sum(rows)
    rows.clear()
    model.scorer.share_prompts = False
    apart = model.score_token_ids(sequences)
    model.scorer.share_prompts = True
    assert np.array_equal(shared, apart)
    assert sum(rows) == sum(map(len, sequences))
    return num_shared, sum(rows)


@pytest.mark.parametrize(("budget", "share"), [(500, 1.0), (4096, 0.95)])
def test_real_candidates(
    fast_model: RewardModel, shared: Path, monkeypatch: pytest.MonkeyPatch, budget: int, share: float
) -> None:
    table = pq.read_table(shared / "data" / "rm_bench_candidates.parquet").slice(0, 42)
    rows = table.select(["prompt", "response"]).to_pylist()
    random.Random(3).shuffle(rows)
    encoded = [fast_model.tokenizer.encode(chat(row["prompt"], row["response"])) for row in rows]
    fast_model.scorer.token_budget = budget
    num_shared, num_apart = both_ways(fast_model, encoded, monkeypatch)
    assert num_shared < share * num_apart


def test_real_pairs(fast_model: RewardModel, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pq.read_table(shared / "data" / "reward_bench_llmbar.parquet").slice(0, 40).to_pylist()
    pairs = [chat(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    encoded = [fast_model.tokenizer.encode(pair) for pair in pairs]
    num_shared, num_apart = both_ways(fast_model, encoded, monkeypatch)
    assert num_shared < 0.85 * num_apart


@pytest.mark.parametrize("depth", [16, 17, 63, 64, 65, 128, 129, 511])
def test_branches_of_every_alignment(model: RewardModel, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = random.Random(depth)
    prompt = [chooser.randrange(6, 500) for _ in range(depth)]
    own = [1, 2, 3, 62, 63, 64, 65, 130, 64 - depth % 64, 65 - depth % 64]
    sequences = [prompt + [chooser.randrange(6, 500) for _ in range(length)] for length in own]
    num_shared, _ = both_ways(model, sequences, monkeypatch)
    assert num_shared == depth + sum(own)


@pytest.mark.parametrize(("name", "end"), [("tiny", [3]), ("golden_fp32", [])])
def test_real_conversations_after_every_turn(
    request: pytest.FixtureRequest, shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: list[int]
) -> None:
    """Chosen and rejected ones, which part after some turns. With no token at the end, turns are prefixes."""
    model: RewardModel = request.getfixturevalue(name)
    table = pq.read_table(shared / "data" / "hh_harmless" / "part-00.parquet", columns=["messages"])
    conversations = [row for row in table["messages"].to_pylist() if len(row) >= 6][:6]
    sequences = []
    for messages in conversations:
        encoded = [model.tokenizer.encode(messages[:stop]) for stop in range(2, len(messages) + 1, 2)]
        sequences += [ids[:-1] + end for ids in encoded]
    random.Random(4).shuffle(sequences)
    alone = np.concatenate([model.score_token_ids([ids]) for ids in sequences])
    rows = rows_read(model, monkeypatch)
    for budget in (150, 10_000):
        rows.clear()
        monkeypatch.setattr(model.scorer, "token_budget", budget)
        assert np.array_equal(model.score_token_ids(sequences), alone)
    distinct = {tuple(sequence[: stop + 1]) for sequence in sequences for stop in range(len(sequence))}
    assert len(rows) == 1
    assert rows[0] < len(distinct) + MIN_SHARED_TOKENS * len(conversations) < 0.6 * sum(map(len, sequences))


def grown(chooser: random.Random, count: int) -> list[list[int]]:
    """Sequences that begin as others do, at any depth: some of them prefixes or copies of others, and some alone."""

    def drawn(length: int) -> list[int]:
        return [chooser.randrange(6, 500) for _ in range(length)]

    sequences = [drawn(chooser.choice([70, 300, 1200]))]
    while len(sequences) < count:
        parent = chooser.choice(sequences)
        start = parent[: chooser.choice([0, len(parent), *(chooser.randint(0, len(parent)) for _ in range(4))])]
        sequences.append(start + drawn(chooser.choice([0, 1, 1, 30, 64, 150]) or int(not start)))
    chooser.shuffle(sequences)
    return sequences


@pytest.mark.parametrize("seed", range(3))
def test_spines_branches_of_branches_prefixes_and_lone_sequences(tiny: RewardModel, seed: int) -> None:
    sequences = grown(random.Random(seed), 30)
    alone = np.concatenate([tiny.score_token_ids([ids]) for ids in sequences])
    before = tiny.scorer.token_budget
    try:
        for budget in (100, 700, 4096):
            tiny.scorer.token_budget = budget
            assert np.array_equal(tiny.score_token_ids(sequences), alone)
    finally:
        tiny.scorer.token_budget = before


def test_a_conversation_over_the_budget_is_read_once_with_all_its_turns(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [1, *(6 + place % 490 for place in range(800))]
    turns = [[*whole[:end], 3] for end in range(101, 802, 100)]
    rows = rows_read(tiny, monkeypatch)
    monkeypatch.setattr(tiny.scorer, "token_budget", 300)
    tiny.score_token_ids(turns)
    assert rows == [len(whole) + len(turns)]


def test_the_same_conversation_many_times(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.tokenizer.encode(chat("Tell me of the sea. " * 10, "It is wide."))
    num_shared, _ = both_ways(model, [ids] * 20, monkeypatch)
    assert num_shared == len(ids)


def test_a_list_of_conversations_shares_prompts_that_stand_apart(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen ones first, then rejected ones, more than are tokenised at a time."""
    questions = [f"Question {number}: why is the sea so wide and so deep, and why is it salt?" for number in range(140)]
    conversations = [chat(question, answer) for answer in ("No.", "It is.") for question in questions]
    rows = rows_read(model, monkeypatch)
    outcomes = model.score(conversations)
    assert sum(rows) < 0.7 * sum(outcome.num_tokens for outcome in outcomes)
    assert [outcome.value for outcome in outcomes[::97]] == [model.get_score(chat) for chat in conversations[::97]]


def test_a_spine_that_is_not_finite_fails_its_branches_and_no_other(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = 500
    prompt = [1, *range(100, 130)]
    clean = [[1, *range(300, 340), last] for last in (7, 8)]
    expected = tiny.score_token_ids(clean)
    embedding = tiny.scorer.decoder.embedding
    kept = embedding[poison].clone()
    embedding[poison] = float("inf")
    try:
        values = tiny.scorer.score([clean[0], [*prompt, poison, 9], [*prompt, poison, 10], clean[1], [*prompt, 11]])
    finally:
        embedding[poison] = kept
    assert [isinstance(value, float) for value in values] == [True, False, False, True, True]
    assert [values[0], values[3]] == expected.tolist()
    rows = rows_read(tiny, monkeypatch)
    tiny.scorer.score([ids[: len(prompt) - 10] + ids[-1:] for ids in clean])
    assert len(rows) == 1  # nothing infinite is left that would make them be read again


def test_every_turn_has_the_score_of_the_conversation_cut_there(
    golden_fp32: RewardModel, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(shared / "data" / "hh_harmless" / "part-01.parquet", columns=["messages"])
    messages = max(table["messages"].slice(0, 60).to_pylist(), key=len)
    ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
    expected = [golden_fp32.score([messages[:end]])[0] for end in ends]
    rows = rows_read(golden_fp32, monkeypatch)
    assert golden_fp32.score_turns(messages) == expected
    assert len(ends) > 2
    assert sum(rows) < 1.2 * expected[-1].num_tokens


def test_turns_of_several_conversations_and_what_cannot_be_scored(tiny: RewardModel) -> None:
    turns = chat("How are you?", "Fine.", "And the sea?", "Salty.")
    first, second, bad, long = tiny.turn_outcomes(
        [
            turns,
            [*turns[:2], {"role": "user", "content": "Bye."}],
            chat("Anyone?"),
            chat("?", "No.", "?", "Yes. " * 50),
        ],
        max_tokens=60,
    )
    assert first == [tiny.score([turns[:2]])[0], tiny.score([turns])[0]]
    assert second == first[:1]
    assert isinstance(bad, ConversationError)
    assert "no turn to score; found 'user'" in str(bad)
    assert isinstance(long, list)
    assert [type(outcome) for outcome in long] == [Score, ConversationTooLongError]
    with pytest.raises(ConversationError, match=r"found 'gpt' \(did you mean 'assistant'\?\)"):
        tiny.score_turns([{"role": "gpt", "content": "Hello."}])
    with pytest.raises(TypeError, match="a list of conversations"):
        tiny.turn_outcomes(Conversation.parse(turns))  # type: ignore[arg-type]
