"""InternLM2ForCausalLM checkpoints as Transformers' Llama, in memory: no code from the checkpoint is needed or run.

The two compute the same: InternLM2 keeps query, key and value in one matrix and has other names. `weight_map.py` of
the engine knows how they lie in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from serve_app.reward_model.architecture import DecoderConfig, RopeConfig
from serve_app.reward_model.checkpoint import fill
from serve_app.reward_model.errors import CheckpointError
from serve_app.reward_model.families import INTERNLM2 as INTERNLM2_REWARD
from serve_app.reward_model.weights import Place, interleaved

ARCHITECTURE = "InternLM2ForCausalLM"


def load_internlm2(folder: Path, *, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The checkpoint in `folder` as a Llama on `device`; its logits equal the original's within rounding.

    Raises:
        CheckpointError: config.json or a weight file is missing or broken.
        UnsupportedArchitectureError: an option of the architecture is not supported.
        WeightError: a weight is missing, surplus or misshapen.
    """
    raw = _read_config(folder)
    config = _shape_of(raw, folder)
    is_tied = bool(raw.get("tie_word_embeddings", False))
    with torch.device("meta"):
        model = LlamaForCausalLM(_llama_config(config, is_tied=is_tied))
    torch.nn.Module.to(model, dtype)
    model.to_empty(device=device)
    # Its buffers are no weights: made anew, since those made on `meta` have no content.
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    model.tie_weights()
    model.eval().requires_grad_(False)
    fill(folder, dict(_places(config, model, is_tied=is_tied)), architecture=ARCHITECTURE)
    model.config.eos_token_id = raw.get("eos_token_id")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return raw


def _shape_of(raw: dict[str, Any], folder: Path) -> DecoderConfig:
    """The trunk is the reward model's: the engine reads its shape and refuses what neither knows."""
    try:
        return DecoderConfig.from_dict(raw | {"architectures": [INTERNLM2_REWARD], "reward_token_id": 0})
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks a field or has one that makes no sense: {error}"
        ) from error


def _llama_config(config: DecoderConfig, *, is_tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_eps,
        max_position_embeddings=config.max_positions,
        rope_parameters=_rope_parameters(config.rope),
        attention_bias=config.qkv_bias,
        tie_word_embeddings=is_tied,
    )


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return parameters if rope.kind == "default" else parameters | {"factor": rope.factor}


def _places(config: DecoderConfig, model: LlamaForCausalLM, *, is_tied: bool) -> Iterator[tuple[str, Place]]:
    yield "model.tok_embeddings.weight", _whole(model.model.embed_tokens.weight)
    yield "model.norm.weight", _whole(model.model.norm.weight)
    if not is_tied:
        yield "output.weight", _whole(model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for name, place in _layer_places(config, layer):
            yield f"model.layers.{index}.{name}", place


def _layer_places(config: DecoderConfig, layer: LlamaDecoderLayer) -> Iterator[tuple[str, Place]]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    yield "attention_norm.weight", _whole(layer.input_layernorm.weight)
    yield "ffn_norm.weight", _whole(layer.post_attention_layernorm.weight)
    yield "attention.wqkv.weight", interleaved(config, *(projection.weight for projection in projections))
    yield "attention.wo.weight", _whole(attention.o_proj.weight)
    yield "feed_forward.w1.weight", _whole(mlp.gate_proj.weight)
    yield "feed_forward.w3.weight", _whole(mlp.up_proj.weight)
    yield "feed_forward.w2.weight", _whole(mlp.down_proj.weight)
    if config.qkv_bias:
        yield "attention.wqkv.bias", interleaved(config, *(projection.bias for projection in projections))
        yield "attention.wo.bias", _whole(attention.o_proj.bias)


def _whole(target: Tensor) -> Place:
    return Place(tuple(target.shape), (target,))
