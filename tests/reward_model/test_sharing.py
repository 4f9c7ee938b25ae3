"""Prompts computed once give the same bits as prompts computed for every answer, on real conversations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from serve_app.reward_model import RewardModel
from tests.conftest import chat


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    name = {"float32": "tiny", "bfloat16": "tiny_bf16"}[request.param]
    reward_model: RewardModel = request.getfixturevalue(name)
    monkeypatch.setattr(reward_model.scorer, "token_budget", reward_model.scorer.token_budget)
    monkeypatch.setattr(reward_model.scorer, "share_prompts", True)
    return reward_model


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
    model: RewardModel, shared: Path, monkeypatch: pytest.MonkeyPatch, budget: int, share: float
) -> None:
    table = pq.read_table(shared / "data" / "rm_bench_candidates.parquet").slice(0, 42)
    rows = table.select(["prompt", "response"]).to_pylist()
    random.Random(3).shuffle(rows)
    encoded = [model.tokenizer.encode(chat(row["prompt"], row["response"])) for row in rows]
    model.scorer.token_budget = budget
    num_shared, num_apart = both_ways(model, encoded, monkeypatch)
    assert num_shared < share * num_apart


def test_real_pairs(model: RewardModel, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pq.read_table(shared / "data" / "reward_bench_llmbar.parquet").slice(0, 40).to_pylist()
    pairs = [chat(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    num_shared, num_apart = both_ways(model, [model.tokenizer.encode(pair) for pair in pairs], monkeypatch)
    assert num_shared < 0.85 * num_apart


@pytest.mark.parametrize("trunk", [16, 17, 63, 64, 65, 128, 129, 511])
def test_trunks_and_leaves_of_every_alignment(model: RewardModel, trunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = random.Random(trunk)
    prompt = [chooser.randrange(6, 500) for _ in range(trunk)]
    leaves = [1, 2, 3, 62, 63, 64, 65, 130, 64 - trunk % 64, 65 - trunk % 64]
    sequences = [prompt + [chooser.randrange(6, 500) for _ in range(leaf)] for leaf in leaves]
    num_shared, _ = both_ways(model, sequences, monkeypatch)
    assert num_shared == trunk + sum(leaves)


def test_the_same_conversation_many_times(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.tokenizer.encode(chat("Tell me of the sea. " * 10, "It is wide."))
    num_shared, _ = both_ways(model, [ids] * 20, monkeypatch)
    assert num_shared == len(ids) + 19


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


def test_a_trunk_that_is_not_finite_fails_its_leaves_and_no_other(tiny: RewardModel) -> None:
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
