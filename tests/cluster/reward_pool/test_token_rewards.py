"""The scalar stands at the last token that counts, whichever side the padding is on."""

from __future__ import annotations

import pytest
import torch

from cluster.reward_pool.errors import RewardInputError
from cluster.reward_pool.rewards import place_at_last_token

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_left_right_and_no_padding(dtype: torch.dtype) -> None:
    placed = place_at_last_token(torch.tensor([1.5, -2.0, 3.0, 4.0]), MASK.to(dtype))
    assert placed.nonzero().tolist() == [[0, 2], [1, 4], [2, 2], [3, 4]]
    assert placed.sum(dim=1).tolist() == [1.5, -2.0, 3.0, 4.0]


def test_shape_and_dtype_are_kept() -> None:
    placed = place_at_last_token(torch.ones(4, 1, dtype=torch.bfloat16), MASK)
    assert placed.shape == MASK.shape
    assert placed.dtype == torch.bfloat16
    assert place_at_last_token(torch.empty(0), torch.empty(0, 7)).shape == (0, 7)


@pytest.mark.parametrize(
    ("rewards", "mask", "message"),
    [
        (torch.ones(3), MASK, r"\[3\] and \[4, 5\]"),
        (torch.ones(4, 2), MASK, r"\[4, 2\]"),
        (torch.ones(4), MASK[0], r"\[4\] and \[5\]"),
        (torch.ones(4, dtype=torch.int64), MASK, "floats, not int64"),
        (torch.ones(2), torch.tensor([[1, 1], [0, 0]]), "row 1 .* keeps no token"),
    ],
)
def test_what_does_not_fit_is_refused(rewards: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(RewardInputError, match=message):
        place_at_last_token(rewards, mask)
