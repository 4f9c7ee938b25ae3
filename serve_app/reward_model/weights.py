"""A decoder's weights as they are loaded: fused matrices on one device, their content filled in by `weight_map.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig

__all__ = ["DecoderWeights", "LayerWeights", "allocate"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` stacks the rows of all query, then all key, then all value heads; `gate_up` gate over up."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights on one device. Matrices and biases are in the model's dtype; norms and `head` [hidden] are float32.

    `embedding` keeps the checkpoint's dtype: it is only read, so rounding it would cost accuracy and gain nothing.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: Tensor

    def moved_to(self, device: torch.device) -> DecoderWeights:
        """The same weights on `device`; layers leave this object as they go, so that the host does not hold two."""
        layers = [_moved(self.layers.pop(0), device) for _ in range(len(self.layers))]
        return DecoderWeights(self.embedding.to(device), layers, self.norm.to(device), self.head.to(device))


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def allocate(config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """Weights of the configuration's shapes on the device, their content yet unset."""

    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def vector(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    def layer() -> LayerWeights:
        qkv_size, hidden = config.query_size + 2 * config.kv_size, config.hidden_size
        return LayerWeights(
            attention_norm=vector(hidden),
            qkv=matrix(qkv_size, hidden),
            output=matrix(hidden, config.query_size),
            mlp_norm=vector(hidden),
            gate_up=matrix(2 * config.intermediate_size, hidden),
            down=matrix(hidden, config.intermediate_size),
            qkv_bias=matrix(qkv_size) if config.qkv_bias else None,
            output_bias=matrix(hidden) if config.output_bias else None,
            gate_up_bias=matrix(2 * config.intermediate_size) if config.mlp_bias else None,
            down_bias=matrix(hidden) if config.mlp_bias else None,
            query_norm=vector(config.head_dim) if config.qk_norm else None,
            key_norm=vector(config.head_dim) if config.qk_norm else None,
        )

    embedding_dtype = getattr(torch, config.dtype)
    return DecoderWeights(
        embedding=torch.empty(config.vocab_size, config.hidden_size, dtype=embedding_dtype, device=device),
        layers=[layer() for _ in range(config.num_layers)],
        norm=vector(config.hidden_size),
        head=vector(config.hidden_size),
    )
