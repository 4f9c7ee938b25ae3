"""The embedded model is held against what it was taught, and one that knows nothing is found out."""

from __future__ import annotations

import pytest

from jobs.benchmarks import taught
from jobs.benchmarks.taught import KindAccuracy
from jobs.verify import VerifyConfig, verify
from serve_app.reward_model import RewardModel, lessons
from serve_app.reward_model.lessons import KINDS


def test_verify_recomputes_the_accuracy_of_the_embedded_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(taught, "NUM_PAIRS", 40)
    assert verify(VerifyConfig(model="tiny", dtype="float32", device="cpu")) == 0
    first, _, model, head, *lines, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny: a toy model that knows ")
    assert model == "tiny in float32 on cpu, on held-out questions"
    assert head.split() == ["kind", "pairs", "right", "if", "longer", "if", "shorter"]
    assert [line[:12].strip() for line in lines] == [*KINDS, "all"]
    assert lines[-1].split()[1] == "640"


def test_random_weights_are_at_chance_and_a_mismatch() -> None:
    model = RewardModel.from_pretrained("tiny-random", device="cpu", dtype="float32")
    found = taught.accuracies(model, num_pairs=20)
    assert 0.35 < taught.total(found).accuracy < 0.65
    assert not taught.is_as_taught(found)


def test_shares_are_those_of_the_pairs() -> None:
    pairs = lessons.pairs("arithmetic", 4, seed=0)  # the right answer is the longer one in the first and the third
    found = KindAccuracy.of("arithmetic", pairs, [True, False, False, False])
    assert found == KindAccuracy("arithmetic", 4, 0.25, 0.5, 0.0)
    whole = taught.total([found, KindAccuracy("topic", 4, 0.75, 1.0, 0.5)])
    assert whole == KindAccuracy("all", 8, 0.5, 0.75, 0.25)
    assert not taught.is_as_taught([KindAccuracy("topic", 4, 1.0, 1.0, 1.0)] * 9 + [found])
    assert taught.is_as_taught([KindAccuracy("topic", 4, 0.9, 0.8, 1.0)])
