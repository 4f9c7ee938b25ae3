"""Weights that were put away come back with every bit; float16 on CPU has plain tensors, as CUDA does."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType

import pytest
import torch

from serve_app.reward_model import RewardModel
from serve_app.reward_model.parked_weights import ParkedWeights

SEQUENCES: Sequence[list[int]] = [[1, *range(10, 10 + length), 3] for length in (5, 60, 200)]


def tensors(holder: object) -> Iterator[torch.Tensor]:
    """Every tensor that an object of ours leads to."""
    seen, waiting = set[int](), [holder]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | FunctionType | ModuleType):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            yield found
        else:
            waiting += gc.get_referents(found)


def test_scores_have_the_same_bits_after_parking(tiny: RewardModel) -> None:
    with pytest.warns(UserWarning, match="float16 on a CPU"):
        model = RewardModel.from_pretrained(str(tiny.folder), device="cpu", dtype="float16")
    before = model.score_token_ids(SEQUENCES)
    decoder = model.scorer.decoder
    embedding = decoder.embedding
    parked = ParkedWeights(decoder)
    assert parked.num_bytes > 2 * model.config.num_parameters
    assert embedding.untyped_storage().nbytes() == 0
    assert not decoder._stages[0]._buffers
    parked.put_back()
    assert decoder.embedding is embedding
    assert model.score_token_ids(SEQUENCES).tolist() == before.tolist()


def test_every_weight_is_parked(tiny: RewardModel) -> None:
    """What is left in the decoder is what follows from the configuration."""
    with pytest.warns(UserWarning, match="float16 on a CPU"):
        model = RewardModel.from_pretrained(str(tiny.folder), device="cpu", dtype="float16")
    model.score_token_ids(SEQUENCES)
    ParkedWeights(model.scorer.decoder)
    sizes = [found.untyped_storage().nbytes() for found in tensors(model.scorer.decoder)]
    assert len(sizes) > 5 * model.config.num_layers
    assert max(sizes) <= 1024 * model.config.head_dim * 4  # angles


def test_a_layout_of_onednns_own_is_refused_and_nothing_is_lost(tiny: RewardModel) -> None:
    before = tiny.score_token_ids(SEQUENCES)
    with pytest.raises(RuntimeError, match="layout"):
        ParkedWeights(tiny.scorer.decoder)
    assert tiny.score_token_ids(SEQUENCES).tolist() == before.tolist()
