"""Ranks are what the model card documents: 0 for the best, by conversation."""

from __future__ import annotations

from serve_app.reward_model.scores import order, ranks


def test_ranks_are_by_conversation_not_the_sorted_order() -> None:
    scores = [0.1, 0.9, 0.5]
    assert order(scores) == [1, 2, 0]
    assert ranks(scores) == [2, 0, 1]  # the card's code returns [1, 2, 0]


def test_equal_scores_rank_in_input_order() -> None:
    assert ranks([1.0, 2.0, 1.0, 2.0]) == [2, 0, 3, 1]


def test_nothing_ranks_as_nothing() -> None:
    assert ranks([]) == []
