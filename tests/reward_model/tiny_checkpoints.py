"""Tiny checkpoints in the layouts of different trainers, and references computed with Transformers' bare models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from serve_app.reward_model import RewardModel

HIDDEN = 64
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SEQUENCES = [np.random.default_rng(0).integers(1, 300, length).tolist() for length in (1, 2, 17, 65, 200)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that keep the size of what they are multiplied by; a vector is drawn around 0."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(float(shape[-1]) ** -0.5)


def body(model_type: str = "llama", *, prefix: str = "model.", seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """Weights of a bare model, every one drawn anew: fresh norms and biases are ones and zeros, and hide a mix-up."""
    bare = AutoModel.from_config(config_of(model_type, **options))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in bare.state_dict().items():
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * spread
        weights[f"{prefix}{name}"] = noise + (1.0 if parameter.ndim == 1 else 0.0)
    return weights


def config_of(model_type: str, **options: Any) -> Any:
    return AutoConfig.for_model(model_type, **(SHAPE | options))


def write(
    folder: Path,
    weights: Mapping[str, Tensor],
    architecture: str,
    model_type: str = "llama",
    *,
    options: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Save config.json and model.safetensors; `options` shape the model, `fields` are added to config.json."""
    folder.mkdir(exist_ok=True, parents=True)
    config = json.loads(config_of(model_type, **(options or {})).to_json_string(use_diff=False))
    for field in ("num_labels", "id2label", "label2id"):
        config.pop(field, None)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]} | fields))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def hidden_states(
    weights: Mapping[str, Tensor], ids: Sequence[int], model_type: str = "llama", **options: Any
) -> Tensor:
    """The hidden states of one sequence after the final norm, by Transformers' bare model: float32 [tokens, hidden]."""
    bare = AutoModel.from_config(config_of(model_type, **options), attn_implementation="eager").eval()
    bare.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    with torch.inference_mode():
        states: Tensor = bare(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return states


def last_states(weights: Mapping[str, Tensor], model_type: str = "llama", **options: Any) -> Tensor:
    """The last hidden state of each of `SEQUENCES`: [sequences, hidden]."""
    return torch.stack([hidden_states(weights, ids, model_type, **options)[-1] for ids in SEQUENCES])


def load(folder: Path, **options: Any) -> RewardModel:
    return RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32", **options)


def assert_scores(model: RewardModel, expected: Tensor) -> None:
    """The scores of `SEQUENCES` are these, and keep their bits alone, reversed and behind each other's beginnings."""
    scores = model.score_token_ids(SEQUENCES)
    np.testing.assert_allclose(scores, expected.float().numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(model.score_token_ids(SEQUENCES[::-1])[::-1], scores)
    assert [model.score_token_ids([ids])[0] for ids in SEQUENCES] == scores.tolist()


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
