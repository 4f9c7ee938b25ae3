"""Scores on their way from a device: what waits for what, with a device that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serve_app.reward_model.scorer import _HostCopy


class Scores:
    """Scores on the second of two cards."""

    shape = (2, 1)
    dtype = torch.float32
    device = torch.device("cuda:1")


class Host:
    def copy_(self, scores: Scores, *, non_blocking: bool) -> None:
        assert non_blocking


def test_a_copy_waits_for_the_card_that_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current card is the first: an event in its stream would say nothing of the second."""
    recorded = []

    class Event:
        def record(self, stream: Any = "the first card's") -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Host())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    _HostCopy.of(Scores())  # type: ignore[arg-type]
    assert recorded == ["that of cuda:1"]
