"""Conversations cut behind each answer, and what was found of them put together again."""

from __future__ import annotations

from serve_app.reward_model import Conversation, ConversationError, ScoringError
from serve_app.reward_model.turn_list import TurnList
from tests.conftest import chat

LONG = Conversation.parse(chat("one", "two", "three", "four", "five"))
SHORT = Conversation.parse(chat("six", "seven"))
SILENT = Conversation.parse(chat("eight"))
TORN = ConversationError("torn")


def test_turns_and_wholes_have_their_places() -> None:
    turns = TurnList.of([LONG, TORN, SHORT, SILENT], with_whole=True)
    assert [len(each.messages) for each in turns.flat] == turns.lengths == [2, 4, 5, 2]
    assert turns.owners == [0, 0, 0, 2]
    long, torn, short, silent = turns.outcomes(["a", "b", "c", "d"])
    assert (long, torn, short) == (["a", "b", "c"], TORN, ["d", "d"])  # the whole stands behind the turns
    assert isinstance(silent, ConversationError)
    assert "no message has the role 'assistant'" in str(silent)


def test_without_wholes_there_are_turns_alone() -> None:
    turns = TurnList.of([LONG, SHORT])
    assert turns.scored([1.0, 2.0, 3.0]) == [[1.0, 2.0], [3.0]]


def test_the_first_turn_without_a_score_is_the_conversations_error() -> None:
    errors = [ScoringError("a"), ScoringError("b")]
    found, other = TurnList.of([LONG, SHORT], with_whole=True).scored([1.0, *errors, 2.0])
    assert (found, other) == (errors[0], [2.0, 2.0])
    assert isinstance(found, ScoringError)
    assert found.index == 1
