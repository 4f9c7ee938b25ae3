"""config.json -> DecoderConfig: the shape of a decoder, whatever its family calls the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError

__all__ = ["SUPPORTED_ARCHITECTURES", "DecoderConfig", "Quantization", "RopeConfig"]

INTERNLM2 = "InternLM2ForRewardModel"
SUPPORTED_ARCHITECTURES = (
    INTERNLM2,
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification",
)
SUPPORTED_ROPE = ("default", "linear", "dynamic", "llama3")

Quantization = Literal["none", "fp8"]
"""How the weights of the linear layers are held: as they are, or in 8-bit floats."""


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
    """The shape of a decoder with a scalar head. Sizes are in elements, positions in tokens.

    A score is read at the last token of a sequence; where there is a `pad_token_id`, at the last that is not it.
    """

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
    pad_token_id: int | None = None
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
    def longest_unstretched(self) -> int | None:
        """Above so many tokens a sequence has rotary angles of its own (dynamic RoPE); None where none ever has."""
        return self.max_positions if self.rope.kind == "dynamic" else None

    def num_read(self, token_ids: Sequence[int]) -> int:
        """How many of a sequence's tokens decide its score: those up to where it is read. At least one is.

        Transformers' `*ForSequenceClassification` read the rightmost token that is not `config.pad_token_id`, padding
        or not, and the first of a sequence of nothing else; without a `pad_token_id`, the last token. Attention is
        causal, so what stands behind changes nothing.
        """
        stop = len(token_ids)
        if self.pad_token_id is not None:
            while stop > 1 and token_ids[stop - 1] == self.pad_token_id:
                stop -= 1
        return stop

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
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{path} has a field that makes no sense: {error}") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The shape that a checkpoint's parsed config.json describes."""
        architecture = _architecture(config)
        internlm2 = architecture == INTERNLM2
        hidden_size, num_heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        vocab_size = _whole(config, "vocab_size")
        bias = bool(config.get("bias" if internlm2 else "attention_bias", False))
        qwen2 = architecture.startswith("Qwen2")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_kv_heads(config, num_heads),
            head_dim=_head_dim(config, hidden_size, num_heads),
            intermediate_size=_whole(config, "intermediate_size"),
            rms_eps=float(config["rms_norm_eps"]),
            max_positions=_max_positions(config, architecture),
            rope=_rope(config),
            reward_token_id=_reward_token_id(config, vocab_size) if internlm2 else None,
            pad_token_id=None if internlm2 else _pad_token_id(config),
            qkv_bias=bias or qwen2,
            output_bias=bias and not qwen2,
            mlp_bias=architecture.startswith("Llama") and bool(config.get("mlp_bias", False)),
            qk_norm=architecture.startswith("Qwen3"),
            dtype=_dtype(config),
        )


def _whole(config: Mapping[str, Any], field: str) -> int:
    value = config[field]
    if type(value) is not int or value < 1:
        raise ValueError(f"{field} is {value!r}, not a positive whole number")
    return value


def _kv_heads(config: Mapping[str, Any], num_heads: int) -> int:
    num_kv_heads = _whole({"num_key_value_heads": num_heads} | _present(config), "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    return num_kv_heads


def _head_dim(config: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    head_dim = _whole({"head_dim": hidden_size // num_heads} | _present(config), "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding pairs its halves, so it is even")
    return head_dim


def _reward_token_id(config: Mapping[str, Any], vocab_size: int) -> int:
    token = config["reward_token_id"]
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(f"reward_token_id is {token!r}, not a token of the vocabulary of {vocab_size}")
    return token


def _pad_token_id(config: Mapping[str, Any]) -> int | None:
    """None where the field is missing or null, as Transformers has it; an id outside the vocabulary pads nothing."""
    token = config.get("pad_token_id")
    if token is not None and type(token) is not int:
        raise ValueError(f"pad_token_id is {token!r}, not a token id")
    return token


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"the weights' dtype is {name!r}; float16, bfloat16 and float32 are supported")
    return name


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {field: value for field, value in config.items() if value is not None}


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


def _max_positions(config: Mapping[str, Any], architecture: str) -> int:
    """Positions the model attends over in full: a sliding window, where one is on, bounds them exactly."""
    positions = _whole(config, "max_position_embeddings")
    in_use = config.get("use_sliding_window", architecture.startswith("Mistral"))
    if not in_use or config.get("sliding_window") is None:
        return positions
    return min(positions, _whole(config, "sliding_window"))


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
        low_freq_factor=float(scaling["low_freq_factor"]) if kind == "llama3" else 1.0,
        high_freq_factor=float(scaling["high_freq_factor"]) if kind == "llama3" else 1.0,
        original_max_positions=int(
            scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
    )
