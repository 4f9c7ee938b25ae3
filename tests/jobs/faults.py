"""Models that fail on purpose, loaded by scoring actors in the fault tests.

Each is a real model whose `outcomes` does harm first when a conversation holds its trigger. Files in `folder` let
harm be done once, and be counted.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from serve_app.reward_model import ModelSpec, RewardModel, Score, ScoringError

POISON = "POISON"


class HarmfulModel:
    """A reward model that calls `harm` before it scores a list with a poisoned conversation in it."""

    def __init__(self, model: RewardModel, folder: Path) -> None:
        self._model = model
        self._folder = folder

    @property
    def processors(self) -> tuple[str, ...]:
        return self._model.processors

    def outcomes(self, conversations: list[Any], **options: Any) -> list[Score | ScoringError]:
        if any(POISON in message.content for conversation in conversations for message in conversation.messages):
            self.harm()
        return self._model.outcomes(conversations, **options)

    def harm(self) -> None:
        raise NotImplementedError


class DyingModel(HarmfulModel):
    """Its process dies at every poisoned list, as under the kernel's out-of-memory killer."""

    def harm(self) -> None:
        (self._folder / f"death-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


class OnceDyingModel(HarmfulModel):
    """Its process dies at the first poisoned list and at no other."""

    def harm(self) -> None:
        if not (self._folder / "died").exists():
            (self._folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class BrokenModel(HarmfulModel):
    """It raises what no row can be blamed for."""

    def harm(self) -> None:
        raise RuntimeError("an illegal memory access")


class Loader:
    """Loads the job's model inside one of the harmful ones; `die_loading` kills the process instead."""

    def __init__(self, kind: type[HarmfulModel] | None, folder: Path) -> None:
        self._kind = kind
        self._folder = folder

    def __call__(self, spec: ModelSpec) -> Any:
        (self._folder / f"load-{os.getpid()}").touch()
        if self._kind is None:
            os.kill(os.getpid(), signal.SIGKILL)
        model = spec.load()
        return self._kind(model, self._folder) if self._kind else model
