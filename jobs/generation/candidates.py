"""Prompts, and the candidates that a generator makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve_app.reward_model.conversation import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages to be answered. `key` is its place in the corpus, of which its seeds are made."""

    messages: tuple[Message, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response; `finish_reason` is why it ends: stop, length (it was cut off), or another word of the server's."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Generation:
    """Outcome of a prompt: `candidates` in the order of their generation, and the reason of each that is missing."""

    candidates: tuple[Candidate, ...]
    failures: tuple[str, ...] = ()


class Generator(Protocol):
    """Answers prompts."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """The outcome of each prompt, in order.

        Raises:
            GeneratorError: it failed in a way that is no prompt's fault.
        """
        ...
