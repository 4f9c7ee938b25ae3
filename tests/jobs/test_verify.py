"""jobs.verify passes a model that gives the card's figures, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import verify
from jobs.benchmarks.published import INTERNLM2_1_8B, POLAR_7B, published_for
from serve_app.reward_model import RewardModel
from tests.reward_model import polar


class CardModel:
    """Gives the card's scores, moved by `shift`."""

    def __init__(self, shift: float, *, device: str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._shift = shift

    def get_scores(self, conversations: list[Any]) -> list[float]:
        known = dict(
            pair
            for figures in (INTERNLM2_1_8B, POLAR_7B)
            for pair in zip(figures.conversations, figures.scores, strict=True)
        )
        return [known[conversation] + self._shift for conversation in conversations]

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


@pytest.mark.parametrize(("shift", "agrees"), [(0.019, True), (0.021, False)])
def test_polars_figures_are_those_of_its_readme(shift: float, agrees: bool) -> None:
    model = CardModel(shift, device="cuda", dtype=torch.float32)
    results = verify.checks(model, POLAR_7B)  # type: ignore[arg-type]
    assert [check.card for check in results] == ["-0.570298", "-11.030371", "True", "[0, 1]"]
    assert all(check.agrees for check in results[:2]) is agrees
    assert {conversation.reference for conversation in POLAR_7B.conversations} == {"Beijing."}


def test_a_polar_checkpoint_is_told_from_internlm2s_by_itself(
    tiny: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published_for(tiny) is INTERNLM2_1_8B
    monkeypatch.setattr("sys.argv", ["jobs.verify", "--model", str(polar.write(tmp_path))])
    assert verify.main() == 1
    assert "no figures are published; internlm/POLAR-7B has some" in capsys.readouterr().err


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
