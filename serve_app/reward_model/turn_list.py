"""Conversations after each of their answers, in one flat list that is scored together, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError, ScoringError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TurnList:
    """What there is to score of conversations after each message of the assistant.

    `flat` are conversations cut behind those messages, in order; `owners` are the places of the conversations they are
    of, and `lengths` how many messages each has. Of each conversation given, `parts` are the places in `flat` of its
    turns, then of the conversation as a whole where that was asked for; or the error of one that has no turns.
    """

    flat: list[Conversation]
    owners: list[int]
    lengths: list[int]
    parts: list[list[int] | ScoringError]

    @classmethod
    def of(cls, parsed: Sequence[Conversation | ScoringError], *, with_whole: bool = False) -> TurnList:
        """The turns of conversations; `with_whole` adds each as a whole, which its last turn is where it ends in one.

        A conversation without a message of the assistant's has an error.
        """
        flat: list[Conversation] = []
        owners: list[int] = []
        parts: list[list[int] | ScoringError] = []
        for owner, item in enumerate(parsed):
            turns = item if isinstance(item, ScoringError) else _turns(item, with_whole)
            if isinstance(turns, ScoringError):
                parts.append(turns)
                continue
            places = list(range(len(flat), len(flat) + len(turns)))
            ends_in_turn = turns[-1].response.role == "assistant"
            parts.append([*places, places[-1]] if with_whole and ends_in_turn else places)
            flat += turns
            owners += [owner] * len(turns)
        return cls(flat, owners, [len(each.messages) for each in flat], parts)

    def outcomes(self, found: Sequence[T | ScoringError]) -> list[list[T | ScoringError] | ScoringError]:
        """What was found of each of `flat`, in a list for each conversation in the order of `parts`; or its error."""
        return [part if isinstance(part, ScoringError) else [found[place] for place in part] for part in self.parts]

    def scored(self, found: Sequence[T | ScoringError]) -> list[list[T] | ScoringError]:
        """Like `outcomes`, for who has use for all scores of a conversation or none: the first error is the one it has,
        with the number of the turn, from 0, in `index`.
        """
        return [part if isinstance(part, ScoringError) else _all_or_error(part) for part in self.outcomes(found)]


def _turns(conversation: Conversation, with_whole: bool) -> list[Conversation] | ConversationError:
    try:
        turns = conversation.turns()
    except ConversationError as error:
        return error
    has_more = len(turns[-1].messages) < len(conversation.messages)
    return [*turns, conversation] if with_whole and has_more else turns


def _all_or_error(outcomes: Sequence[T | ScoringError]) -> list[T] | ScoringError:
    good: list[T] = []
    for turn, outcome in enumerate(outcomes):
        if isinstance(outcome, ScoringError):
            outcome.index = turn
            return outcome
        good.append(outcome)
    return good
