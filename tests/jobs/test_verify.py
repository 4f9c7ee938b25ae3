"""jobs.verify passes a model that gives the card's figures, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs import verify
from serve_app.reward_model import RewardModel


class CardModel:
    """Gives the card's scores, moved by `shift`."""

    def __init__(self, shift: float, *, device: str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._shift = shift

    def get_scores(self, conversations: list[Any]) -> list[float]:
        return [score + self._shift for score in verify.CARD_SCORES[: len(conversations)]]

    compare = RewardModel.compare
    rank = RewardModel.rank


@pytest.mark.parametrize(
    ("device", "dtype", "shift", "agrees"),
    [
        ("cuda", torch.float16, 0.019, True),
        ("cuda", torch.float16, 0.021, False),
        ("cuda", torch.bfloat16, 0.14, True),
        ("cpu", torch.float16, 0.14, True),
        ("cpu", torch.float32, 0.16, False),
    ],
)
def test_scores_agree_within_the_dtypes_tolerance(device: str, dtype: torch.dtype, shift: float, agrees: bool) -> None:
    results = verify.checks(CardModel(shift, device=device, dtype=dtype))  # type: ignore[arg-type]
    assert [check.name for check in results] == ["score_1", "score_2", "compare", "rank"]
    assert all(check.agrees for check in results[:2]) is agrees
    assert all(check.agrees for check in results[2:])


def test_a_wrong_model_is_a_mismatch(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs.verify", "--model", str(tiny.folder)])
    assert verify.main() == 4
    printed = capsys.readouterr().out
    assert "0.767578" in printed
    assert "MISMATCH" in printed


def test_a_model_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs.verify", "--model", "./nowhere"])
    assert verify.main() == 1
    assert "jobs.verify stopped: model folder ./nowhere does not exist" in capsys.readouterr().err
