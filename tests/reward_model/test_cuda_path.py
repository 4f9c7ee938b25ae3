"""The CUDA path, emulated: everything but its kernels runs here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from serve_app.reward_model import RewardModel
from tests.goldens import WEIGHTS, make_golden
from tests.reward_model.emulated_cuda import emulate_cuda


@pytest.mark.parametrize("variant", sorted(WEIGHTS))
def test_every_variant_scores_as_the_original(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_golden(variant, tmp_path / variant)
    emulate_cuda(monkeypatch)
    model = RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32", invariant=False)
    cases = json.loads((folder / "scores.json").read_text())[::4]
    scores = model.score_token_ids([case["input_ids"] for case in cases])
    np.testing.assert_allclose(scores, [case["score"] for case in cases], atol=1e-3, rtol=1e-4)


def test_sequences_that_share_a_prefix_score_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_cuda(monkeypatch)
    model = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32", invariant=False)
    prompt, turn = list(range(100, 190)), list(range(300, 340))
    sequences = [[*prompt, *[200 + n] * n] for n in (1, 30, 7)]
    sequences += [[*prompt, *turn, 7], [*prompt, *turn, 9, 9], [*prompt, *turn], [5, 6, 7]]
    shared = model.score_token_ids(sequences)
    model.scorer.share_prompts = False
    np.testing.assert_allclose(shared, model.score_token_ids(sequences), atol=1e-4)
