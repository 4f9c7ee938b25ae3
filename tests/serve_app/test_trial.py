"""How many CPU threads a replica takes: those that its model gains by."""

from __future__ import annotations

import pytest
import torch

from serve_app import trial
from serve_app.reward_model import RewardModel
from serve_app.trial import best_rate, fewest_threads, on_fewest_threads


@pytest.mark.parametrize(
    ("rates", "taken"),
    [
        ({8: 100.0, 4: 95.0, 2: 90.0, 1: 50.0}, 2),  # a small model
        ({8: 100.0, 4: 55.0, 2: 30.0, 1: 15.0}, 8),  # one whose products are large
        ({8: 80.0, 4: 100.0, 2: 79.0, 1: 90.0}, 4),  # more threads may be slower; what one gives is not asked then
        ({6: 100.0, 3: 90.0, 1: 85.0}, 1),
        ({1: 7.0}, 1),
    ],
)
def test_fewest_threads_that_give_most_of_the_best_rate(rates: dict[int, float], taken: int) -> None:
    assert fewest_threads(rates.__getitem__, max(rates)) == (taken, rates[taken])


@pytest.mark.parametrize(("long_pass_s", "threads"), [(1e9, 1), (0.0, 2)])
def test_a_model_that_is_slow_keeps_all_threads(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, long_pass_s: float, threads: int
) -> None:
    def chosen(rate_with: object, most: int) -> tuple[int, float]:
        return 1, 5.0

    monkeypatch.setattr(trial, "LONG_PASS_S", long_pass_s)
    monkeypatch.setattr(trial, "fewest_threads", chosen)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rate = on_fewest_threads(tiny)
        assert torch.get_num_threads() == threads
        assert (rate == 5.0) == (threads == 1)
    finally:
        torch.set_num_threads(before)


def test_the_trial_reads_every_token_and_leaves_the_scorer_as_it_was(tiny: RewardModel) -> None:
    passes: list[int] = []
    score = tiny.scorer.decoder.score

    def counted(sequences: list[list[int]], branches: list[object], **options: object) -> torch.Tensor:
        passes.append(sum(branch.num_own([len(each) for each in sequences]) for branch in branches))  # type: ignore[attr-defined]
        return score(sequences, branches, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.scorer.decoder, "score", counted)
        assert best_rate(tiny, passes=2) > 0
    assert sum(passes) == 3 * trial.TRIAL_TOKENS
    assert tiny.scorer.share_prompts
