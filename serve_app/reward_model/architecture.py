"""config.json -> DecoderConfig: the shape of a decoder, whatever its family calls the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError

__all__ = ["SUPPORTED_ARCHITECTURES", "DecoderConfig", "RopeConfig"]

INTERNLM2 = "InternLM2ForRewardModel"
SUPPORTED_ARCHITECTURES = (
    INTERNLM2,
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification",
)
SUPPORTED_ROPE = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `theta` is the base, `kind` one of `SUPPORTED_ROPE`, the rest its scaling."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder with a scalar head. Sizes are in elements, positions in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    max_positions: int
    rope: RopeConfig
    reward_token_id: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model is scored on; dynamic RoPE stretches its positions by its factor."""
        return int(self.max_positions * self.rope.factor) if self.rope.kind == "dynamic" else self.max_positions

    @property
    def num_parameters(self) -> int:
        """Parameters without the embedding: those that a token is multiplied by."""
        attention = self.hidden_size * (self.query_size + 2 * self.kv_size) + self.query_size * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @classmethod
    def from_folder(cls, folder: Path) -> DecoderConfig:
        """Read `folder/config.json`.

        Raises:
            CheckpointError: it is missing or not JSON, or a field is missing.
            UnsupportedArchitectureError: the architecture or one of its options is not supported.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        try:
            return cls.from_dict(config)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks the field {error}") from None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The shape that a checkpoint's parsed config.json describes."""
        architecture = _architecture(config)
        num_heads = config["num_attention_heads"]
        internlm2 = architecture == INTERNLM2
        bias = bool(config.get("bias", False)) if internlm2 else bool(config.get("attention_bias", False))
        qwen2 = architecture.startswith("Qwen2")
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            intermediate_size=config["intermediate_size"],
            rms_eps=config["rms_norm_eps"],
            max_positions=_max_positions(config),
            rope=_rope(config),
            reward_token_id=config["reward_token_id"] if internlm2 else None,
            qkv_bias=bias or qwen2,
            output_bias=bias and not qwen2,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture.startswith("Qwen3"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    found = architectures[0] if architectures else None
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    if found not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitectureError(f"architecture {found} is not supported; these are: {supported}")
    if found != INTERNLM2 and (num_labels := _num_labels(config)) != 1:
        raise UnsupportedArchitectureError(f"{found} has {num_labels} labels; a reward model has num_labels == 1")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedArchitectureError(f"hidden_act {activation!r} is not supported; 'silu' is")
    return str(found)


def _num_labels(config: Mapping[str, Any]) -> int:
    if config.get("num_labels") is not None:
        return int(config["num_labels"])
    return len(config.get("id2label") or {0: "", 1: ""})  # Transformers' default is two


def _max_positions(config: Mapping[str, Any]) -> int:
    """Positions the model attends over in full: a sliding window, where one is on, bounds them exactly."""
    positions = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    in_use = window is not None and config.get("use_sliding_window", config.get("model_type") == "mistral")
    return min(positions, int(window)) if in_use and window is not None else positions


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: `rope_scaling` beside `rope_theta`, and Transformers 5's `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedArchitectureError(f"RoPE scaling {kind!r} is not supported; these are: {SUPPORTED_ROPE}")
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if float(partial) != 1.0:
        raise UnsupportedArchitectureError(f"partial_rotary_factor {partial} is not supported; 1.0 is")
    if kind == "default":
        return RopeConfig(theta=theta)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 1.0)),
        original_max_positions=int(
            scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
    )
