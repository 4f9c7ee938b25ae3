"""One reward a sequence -> one a token, as PPO wants it: the scalar at the last token that counts, 0 elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.reward_pool.errors import RewardInputError

__all__ = ["place_at_last_token"]


def place_at_last_token(rewards_B: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Put each reward at the last position that its row's mask keeps. Shape legend: B sequences, T tokens.

    Args:
        rewards_B: [B] or [B, 1], of a floating dtype.
        attention_mask_BT: [B, T], nonzero where a token counts: of the whole sequence or of its response, padded on
            either side.

    Returns:
        [B, T], zeros but for the rewards; dtype and device of `rewards_B`.

    Raises:
        RewardInputError: the shapes do not fit, the rewards are no floats, or a row keeps no token.
    """
    if rewards_B.ndim == 2 and rewards_B.shape[1] == 1:
        rewards_B = rewards_B[:, 0]
    if attention_mask_BT.ndim != 2 or rewards_B.shape != attention_mask_BT.shape[:1]:
        raise RewardInputError(
            f"rewards are [B] and the attention mask [B, T]; got {list(rewards_B.shape)} and "
            f"{list(attention_mask_BT.shape)}"
        )
    if not rewards_B.is_floating_point():
        raise RewardInputError(f"rewards are floats, not {str(rewards_B.dtype).removeprefix('torch.')}")
    kept_BT = attention_mask_BT.to(rewards_B.device) != 0
    if not bool(kept_BT.any(dim=1).all()):
        row = int((~kept_BT.any(dim=1)).nonzero()[0, 0])
        raise RewardInputError(f"row {row} of the attention mask keeps no token, so its reward has no place")
    positions_T = torch.arange(kept_BT.shape[1], device=rewards_B.device)
    last_B = (kept_BT * positions_T).amax(dim=1)
    placed_BT = torch.zeros(kept_BT.shape, dtype=rewards_B.dtype, device=rewards_B.device)
    return placed_BT.scatter_(1, last_B[:, None], rewards_B[:, None])
