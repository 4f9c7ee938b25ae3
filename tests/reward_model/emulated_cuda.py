"""The CUDA path on a CPU: variable-length attention is computed plainly behind FlashAttention's own checks, products
run in CUDA's tiles, batches are padded as there. Kernels, and with them bits, are not CUDA's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from serve_app.reward_model import decoder
from serve_app.reward_model.attention import VarlenAttention
from serve_app.reward_model.invariance import RowRule
from serve_app.reward_model.linear import CUDA_TILE_ROWS, DenseLinear


def emulate_cuda(patch: pytest.MonkeyPatch) -> None:
    """Decoders made from now on take CUDA's path."""
    patch.setattr(varlen, "varlen_attn", varlen_attn)
    patch.setattr(
        decoder,
        "attention_for",
        lambda device, *args, invariant=True, **options: VarlenAttention(device, invariant=invariant),
    )
    patch.setattr(decoder, "linear_for", lambda weight, bias, **options: DenseLinear(weight, bias, CUDA_TILE_ROWS))
    patch.setattr(decoder, "merges_products", lambda weight, quantization: True)
    rule = RowRule(multiple=CUDA_TILE_ROWS, tile_rows=CUDA_TILE_ROWS)
    patch.setattr(RowRule, "for_device", classmethod(lambda cls, device, **options: rule))


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of each sequence's queries over its keys, causal from the end: what `torch` 2.13 documents."""
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    left, right = window_size
    assert right == 0, "the engine's attention is causal"
    assert enable_gqa or query.shape[1] == key.shape[1]
    group = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for queries, keys in zip(_ranges(cu_seq_q), _ranges(cu_seq_k), strict=True):
        q, k, v = (x.float().transpose(0, 1) for x in (query[queries], key[keys], value[keys]))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        places = torch.arange(k.shape[1])
        own = places[len(places) - q.shape[1] :, None]
        hidden = places > own
        if left >= 0:
            hidden |= places < own - left
        weights = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        out[queries] = (weights @ v).transpose(0, 1).to(query.dtype)
    return out


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> None:
    """What FlashAttention refuses, and what it does not see: ends and longest lengths that are not the tensors'."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert query.shape[1] % key.shape[1] == 0
    assert key.shape == value.shape
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    assert bool((cu_seq_k.diff() >= cu_seq_q.diff()).all()), "a query before its sequence's first key sees nothing"


def _ranges(starts: Tensor) -> list[slice]:
    return [slice(first, stop) for first, stop in itertools.pairwise(starts.tolist())]
