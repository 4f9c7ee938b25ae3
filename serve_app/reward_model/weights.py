"""A decoder's weights: which checkpoint tensor goes where, and the fused matrices they are copied into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.device_map import DeviceMap
from serve_app.reward_model.errors import WeightError
from serve_app.reward_model.head_weights import (
    LANGUAGE_HEAD,
    HeadPlan,
    HeadWeights,
    allocate_head,
    head_targets,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one checkpoint tensor of `shape` goes: `targets` are views of fused weights that take its parts."""

    shape: tuple[int, ...]
    targets: tuple[Tensor, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)

    def check(self, name: str, shape: tuple[int, ...], file: str) -> None:
        if shape != self.shape:
            raise WeightError(
                f"weight {name} has shape {list(shape)}; the configuration asks for {list(self.shape)} ({file})"
            )

    def copy(self, tensor: Tensor) -> None:
        """Copy a tensor's parts to their places; to a card it goes as it lies in the file, and is cut there."""
        if self.targets[0].device.type == "cuda":
            tensor = tensor.to(self.targets[0].device)
        for target, part in zip(self.targets, self.split(tensor), strict=True):
            target.copy_(part)


def places_of(
    config: DecoderConfig, weights: DecoderWeights, plan: HeadPlan, stored: Collection[str]
) -> Iterator[tuple[str, Place]]:
    """Plain checkpoint names and where they go, for the configuration's family and the head that was found.

    `stored` are the names that are there: a language model's head may be its embedding.
    """
    internlm2 = config.family == "internlm2"
    embedding = "model.tok_embeddings.weight" if internlm2 else "model.embed_tokens.weight"
    rows = list(config.head.vocabulary_rows)
    yield embedding, _whole(weights.embedding)
    yield "model.norm.weight", _norm(config, weights.norm)
    if not rows:
        yield from ((name, _whole(target)) for name, target in head_targets(plan, weights.head))
    else:
        shape, target = tuple(weights.embedding.shape), weights.head.layers[0].weight
        if LANGUAGE_HEAD in stored:
            yield LANGUAGE_HEAD, Place(shape, (target,), lambda head: (head[rows],))
        else:  # tied: the later of the two places for one name counts
            yield embedding, Place(shape, (weights.embedding, target), lambda head: (head, head[rows]))
    layer_places = _internlm2_layer if internlm2 else _llama_layer
    for index, layer in enumerate(weights.layers):
        for name, place in layer_places(config, layer):
            yield f"model.layers.{index}.{name}", place


def _internlm2_layer(config: DecoderConfig, layer: LayerWeights) -> Iterator[tuple[str, Place]]:
    yield "attention_norm.weight", _whole(layer.attention_norm)
    yield "ffn_norm.weight", _whole(layer.mlp_norm)
    yield "attention.wqkv.weight", _interleaved(config, layer.qkv)
    yield "attention.wo.weight", _whole(layer.output)
    gate, up = layer.gate_up.chunk(2)
    yield "feed_forward.w1.weight", _whole(gate)
    yield "feed_forward.w3.weight", _whole(up)
    yield "feed_forward.w2.weight", _whole(layer.down)
    if layer.qkv_bias is not None and layer.output_bias is not None:
        yield "attention.wqkv.bias", _interleaved(config, layer.qkv_bias)
        yield "attention.wo.bias", _whole(layer.output_bias)


def _llama_layer(config: DecoderConfig, layer: LayerWeights) -> Iterator[tuple[str, Place]]:
    """Llama's names, which Mistral, Qwen and Gemma share; each has the biases and norms its configuration says."""
    yield from _llama_norms(config, layer)
    sizes = [config.query_size, config.kv_size, config.kv_size]
    parts = {
        **dict(zip((f"self_attn.{x}_proj.weight" for x in "qkv"), layer.qkv.split(sizes), strict=True)),
        "self_attn.o_proj.weight": layer.output,
        **dict(zip(("mlp.gate_proj.weight", "mlp.up_proj.weight"), layer.gate_up.chunk(2), strict=True)),
        "mlp.down_proj.weight": layer.down,
    }
    if layer.qkv_bias is not None:
        parts |= zip((f"self_attn.{x}_proj.bias" for x in "qkv"), layer.qkv_bias.split(sizes), strict=True)
    if layer.output_bias is not None:
        parts["self_attn.o_proj.bias"] = layer.output_bias
    if layer.gate_up_bias is not None and layer.down_bias is not None:
        parts |= zip(("mlp.gate_proj.bias", "mlp.up_proj.bias"), layer.gate_up_bias.chunk(2), strict=True)
        parts["mlp.down_proj.bias"] = layer.down_bias
    if layer.query_norm is not None and layer.key_norm is not None:
        parts |= {"self_attn.q_norm.weight": layer.query_norm, "self_attn.k_norm.weight": layer.key_norm}
    for name, target in parts.items():
        yield name, _whole(target)


def _llama_norms(config: DecoderConfig, layer: LayerWeights) -> Iterator[tuple[str, Place]]:
    """Norms of the residual stream. Where what is added to it is normed too (Gemma 2), the names shift by one."""
    yield "input_layernorm.weight", _norm(config, layer.attention_norm)
    if layer.attention_output_norm is None or layer.mlp_output_norm is None:
        yield "post_attention_layernorm.weight", _norm(config, layer.mlp_norm)
        return
    yield "post_attention_layernorm.weight", _norm(config, layer.attention_output_norm)
    yield "pre_feedforward_layernorm.weight", _norm(config, layer.mlp_norm)
    yield "post_feedforward_layernorm.weight", _norm(config, layer.mlp_output_norm)


def _norm(config: DecoderConfig, target: Tensor) -> Place:
    """A norm's weight, with what its family adds to it (Gemma saves it less one)."""
    if not config.norm_offset:
        return _whole(target)
    return Place(tuple(target.shape), (target,), lambda weight: (weight.float() + config.norm_offset,))


def _whole(target: Tensor) -> Place:
    return Place(tuple(target.shape), (target,))


def _interleaved(config: DecoderConfig, qkv: Tensor) -> Place:
    return interleaved(config, *qkv.split([config.query_size, config.kv_size, config.kv_size]))


def interleaved(config: DecoderConfig, query: Tensor, key: Tensor, value: Tensor) -> Place:
    """InternLM2's `wqkv`: for each key/value head its query heads, then its key, then its value."""
    rest = tuple(query.shape[1:])
    group = config.num_heads // config.num_kv_heads

    def split(wqkv: Tensor) -> tuple[Tensor, ...]:
        heads = wqkv.view(config.num_kv_heads, group + 2, config.head_dim, *rest)
        return tuple(part.reshape(-1, *rest) for part in heads.split([group, 1, 1], dim=1))

    return Place((config.query_size + 2 * config.kv_size, *rest), (query, key, value), split)


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
    attention_output_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights, on the devices of their map. Matrices and biases are in the model's dtype; norms and the head are
    float32.

    `embedding` keeps the checkpoint's dtype: it is only read, so rounding it would cost accuracy and gain nothing.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head: HeadWeights
    device_map: DeviceMap

    def moved_to(self, device_map: DeviceMap) -> DecoderWeights:
        """The same weights elsewhere; layers leave this object as they go, so that the host does not hold two."""
        first, last = device_map.devices[0], device_map.devices[-1]
        layers = [_moved(self.layers.pop(0), device) for device in device_map.of_layers()]
        return DecoderWeights(
            self.embedding.to(first), layers, self.norm.to(last), self.head.moved_to(last), device_map
        )


def _moved(layer: LayerWeights, device: torch.device) -> LayerWeights:
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def allocate(
    config: DecoderConfig,
    *,
    device: torch.device | Sequence[torch.device],
    dtype: torch.dtype,
    head: HeadPlan | None = None,
) -> DecoderWeights:
    """Weights of the configuration's shapes on the device, or spread over several, their content yet unset.

    `head` None is one plain row. Raises `DeviceError` where there are more devices than layers.
    """
    devices = (device,) if isinstance(device, torch.device) else tuple(device)
    device_map = DeviceMap.of(config, devices, itemsize=dtype.itemsize)
    first, last = devices[0], devices[-1]
    return DecoderWeights(
        embedding=torch.empty(config.vocab_size, config.hidden_size, dtype=getattr(torch, config.dtype), device=first),
        layers=[_layer(config, dtype, on) for on in device_map.of_layers()],
        norm=torch.empty(config.hidden_size, dtype=torch.float32, device=last),
        head=allocate_head(head or HeadPlan.plain(config), device=last),
        device_map=device_map,
    )


def _layer(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    def matrix(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def vector(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

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
        attention_output_norm=vector(hidden) if config.sandwich_norms else None,
        mlp_output_norm=vector(hidden) if config.sandwich_norms else None,
    )
