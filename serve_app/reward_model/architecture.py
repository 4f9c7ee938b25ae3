"""config.json -> DecoderConfig: the shape of a decoder and its head, whatever its family calls the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError
from serve_app.reward_model.families import (
    ARCHITECTURES,
    GATE_PATTERN,
    INTERNLM2,
    MODEL_TYPES,
    REFUSED,
    SUPPORTED_ARCHITECTURES,
    Activation,
    Architecture,
    Family,
    HeadKind,
    Reading,
    StepRule,
    attribute_names,
)
from serve_app.reward_model.fp8_weights import Fp8Layout

PAD_READINGS = ("last_non_pad", "before_first_pad")
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
class Normalization:
    """Mean and standard deviation of a reward model's scores on its trainer's data, as OpenRLHF saves them.

    OpenRLHF gives `(score - mean) / std` where it is started with reward normalisation and the raw score elsewhere
    (`openrlhf/models/model.py`), so it is applied where it is asked for alone.
    """

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head makes of hidden states, and where it reads them.

    `prefix` is a name of the head's own from config.json. `named` is the option that chose the head, where one did;
    `vocabulary_rows` are then those that a "logit" or "two_logits" head reads, of two the good step's first. A process
    reward model has `steps`, its rule, and "trl" a `separator`. A gating head has `attributes`, a `temperature` and a
    `gate_pattern`: the gate reads the first token of the last place that these ids stand at. `normalize` applies
    `normalization`.
    """

    kind: HeadKind = "scalar"
    prefix: str | None = None
    named: str | None = None
    vocabulary_rows: tuple[int, ...] = ()
    steps: StepRule | None = None
    separator: str = "\n"
    num_quantiles: int = 1
    temperature: float = 1.0
    gate_pattern: tuple[int, ...] = ()
    attributes: tuple[str, ...] = ()
    normalization: Normalization | None = None
    normalize: bool = False


Window = int | None
"""Tokens that one sees of those before it, itself included; None sees all."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder with a head. Sizes are in elements, positions in tokens.

    `reading` says at which token the authors' code reads the score (`families.Reading`). `windows` has one entry for
    each layer, or none where every layer sees all. `norm_offset` is what is added to the weights of norms,
    `embedding_scale` what embeddings are multiplied by. `fp8` is the layout of a checkpoint whose matrices are 8-bit
    floats.
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
    family: Family = "llama"
    reading: Reading = "last"
    head: HeadConfig = HeadConfig()
    activation: Activation = "silu"
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    windows: tuple[Window, ...] = ()
    fp8: Fp8Layout | None = None

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

        Where the `reading` is "last_non_pad", as Transformers' `*ForSequenceClassification` have it, that is the
        rightmost token that is not `pad_token_id`, padding or not, and the first of a sequence of nothing else; where
        it is "before_first_pad", the one before the first `pad_token_id`, and the last where none or only the first is
        one. Every other reading, and one without a `pad_token_id`, is of the last token. Attention is causal, so what
        stands behind changes nothing.
        """
        stop = len(token_ids)
        if self.pad_token_id is None:
            return stop
        if self.reading == "before_first_pad":
            return next((at for at, token in enumerate(token_ids) if token == self.pad_token_id), 0) or stop
        while stop > 1 and token_ids[stop - 1] == self.pad_token_id:
            stop -= 1
        return stop

    @property
    def num_parameters(self) -> int:
        """Parameters without the embedding: those that a token is multiplied by."""
        attention = self.hidden_size * (self.query_size + 2 * self.kv_size) + self.query_size * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @classmethod
    def from_folder(cls, folder: Path, *, head: str | None = None, normalize: bool = False) -> DecoderConfig:
        """Read `folder/config.json`; `checkpoint.read_config` also reads what adapters and side files say.

        Raises:
            CheckpointError: it is missing or not JSON, or a field is missing.
            UnsupportedArchitectureError: the architecture or one of its options is not supported.
        """
        path = folder / "config.json"
        return cls.parse(read_json(path), path=path, head=head, normalize=normalize)

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], *, path: Path, head: str | None = None, normalize: bool = False
    ) -> DecoderConfig:
        """Like `from_dict`, with errors that name the file."""
        try:
            return cls.from_dict(config, head=head, normalize=normalize)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks the field {error}") from None
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{path} has a field that makes no sense: {error}") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, head: str | None = None, normalize: bool = False) -> DecoderConfig:
        """The shape that a checkpoint's parsed config.json describes.

        `head` is needed where the class does not say it: `"logit:ID"` reads the logit of a language model's vocabulary
        row, `"value_head"` says that a value head lies beside its weights, and `"steps:RULE"` that it is a process
        reward model (`checkpoint.read_config` finds the vocabulary rows that those read). `normalize` asks for the
        checkpoint's own normalisation of scores.
        """
        fp8 = Fp8Layout.of(config)
        name, architecture = _architecture(config, head)
        family = architecture.family or _family_of(config, name)
        gemma = family in ("gemma", "gemma2")
        hidden_size, num_heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        vocab_size, num_layers = _whole(config, "vocab_size"), _whole(config, "num_hidden_layers")
        bias = bool(config.get("bias" if family == "internlm2" else "attention_bias", False))
        return cls(
            architecture=name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_kv_heads(config, num_heads),
            head_dim=_head_dim(config, hidden_size, num_heads),
            intermediate_size=_whole(config, "intermediate_size"),
            rms_eps=float(config["rms_norm_eps"]),
            max_positions=_max_positions(config, family),
            rope=_rope(config),
            reward_token_id=_reward_token_id(config, vocab_size) if name == INTERNLM2 else None,
            pad_token_id=_pad_token_id(config, family) if architecture.reading in PAD_READINGS else None,
            qkv_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            dtype=_dtype(config),
            family=family,
            reading=architecture.reading,
            head=_head(config, architecture, head=head, normalize=normalize, vocab_size=vocab_size),
            activation=_activation(config, family),
            norm_offset=1.0 if gemma else 0.0,
            sandwich_norms=family == "gemma2",
            embedding_scale=hidden_size**0.5 if gemma else 1.0,
            attention_scale=float(config["query_pre_attn_scalar"]) ** -0.5 if family == "gemma2" else None,
            attention_softcap=_softcap(config) if family == "gemma2" else None,
            windows=_windows(config, num_layers) if family == "gemma2" else (),
            fp8=fp8,
        )


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a checkpoint's file.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


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


def _pad_token_id(config: Mapping[str, Any], family: Family) -> int | None:
    """None where the field is missing or null, as Transformers has it; an id outside the vocabulary pads nothing.

    Gemma's classes of configuration have 0 where it is missing.
    """
    token = config.get("pad_token_id", 0 if family in ("gemma", "gemma2") else None)
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


def _architecture(config: Mapping[str, Any], head: str | None) -> tuple[str, Architecture]:
    architectures = config.get("architectures") or []
    name = str(architectures[0]) if architectures else "None"
    if name in REFUSED:
        raise UnsupportedArchitectureError(f"architecture {name} is not supported: {REFUSED[name]}")
    if name not in ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UnsupportedArchitectureError(f"architecture {name} is not supported; these are: {supported}")
    architecture = ARCHITECTURES[name]
    if architecture.is_language_model and head is None:
        raise UnsupportedArchitectureError(
            f"{name} is a language model, not a reward model. Where its authors read the reward from a logit, name the "
            "vocabulary row, as head='logit:0'; a value head lies in value_head.safetensors beside it; of a process "
            f"reward model name the rule of its steps, as {_rules_told(LANGUAGE_RULES)}"
        )
    if head is not None and head.startswith(STEPS):
        return name, _stepwise(config, name, architecture, head)
    if architecture.counts_labels and (num_labels := _num_labels(config)) != 1:
        told = f"{name} has {num_labels} labels; a reward model has num_labels == 1"
        if num_labels == 2 and name.endswith(TOKEN_CLASSIFICATION):
            told += (
                ". If TRL's PRMTrainer made it, which its files do not say, it scores the steps of an answer: "
                "head='steps:trl', or 'steps:trl:SEPARATOR' with another separator than a newline"
            )
        raise UnsupportedArchitectureError(told)
    return name, architecture


STEPS = "steps:"
TOKEN_CLASSIFICATION = "ForTokenClassification"
LANGUAGE_RULES: tuple[StepRule, ...] = ("shepherd", "rlhflow")


def _rules_told(rules: Sequence[StepRule]) -> str:
    return " or ".join(f"head='{STEPS}{rule}'" for rule in rules)


def _stepwise(config: Mapping[str, Any], name: str, architecture: Architecture, head: str) -> Architecture:
    """The class as the process reward model that `head` says it is."""
    rule = head.removeprefix(STEPS).partition(":")[0]
    if architecture.is_language_model and rule in LANGUAGE_RULES:
        if architecture.family in ("gemma", "gemma2", "internlm2"):
            raise UnsupportedArchitectureError(f"head={head!r} is not supported for {architecture.family}")
        return replace(architecture, reading="step", head="two_logits", steps=rule)
    if name.endswith(TOKEN_CLASSIFICATION) and rule == "trl" and _num_labels(config) == 2:
        return replace(architecture, reading="step", head="two_labels", steps="trl")
    raise UnsupportedArchitectureError(
        f"head={head!r} does not fit {name}: {_rules_told(LANGUAGE_RULES)} are for language models, {STEPS}trl is for "
        f"*{TOKEN_CLASSIFICATION} with two labels, and other process reward models say themselves what they are"
    )


def _family_of(config: Mapping[str, Any], name: str) -> Family:
    """The family of a class that trainers put on any: config.json's model_type says it."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise UnsupportedArchitectureError(
            f"{name} with model_type {model_type!r} is not supported; these are: {known}"
        )
    return MODEL_TYPES[model_type]


def _head(
    config: Mapping[str, Any], architecture: Architecture, *, head: str | None, normalize: bool, vocab_size: int
) -> HeadConfig:
    normalization = _normalization(config)
    if normalize and normalization is None:
        raise UnsupportedArchitectureError("the checkpoint has no mean and std to normalise scores with")
    if config.get("do_normalize"):
        raise UnsupportedArchitectureError("do_normalize (a score normaliser inside the model) is not supported")
    kind: HeadKind = architecture.head
    rows: tuple[int, ...] = ()
    if head == "value_head":
        head = None
    elif head is not None and architecture.steps is None:
        kind, rows = "logit", (_logit_row(head, architecture, vocab_size),)
        head = f"logit:{rows[0]}"
    num_attributes = int(config.get("num_objectives") or 19)
    return HeadConfig(
        kind=kind,
        prefix=config.get("value_head_prefix"),
        named=head,
        vocabulary_rows=rows,
        steps=architecture.steps,
        separator=_separator(head),
        num_quantiles=_whole(config, "num_quantiles") if kind == "quantile_gating" else 1,
        temperature=float(config.get("gating_temperature") or 10.0),
        gate_pattern=GATE_PATTERN if kind in ("gating", "quantile_gating") else (),
        attributes=attribute_names(kind, num_attributes, _num_labels(config)),
        normalization=normalization,
        normalize=normalize,
    )


def _separator(head: str | None) -> str:
    """The text between steps, of `"steps:trl:TEXT"`; newlines may be spelled as `\\n`."""
    text = (head or "").removeprefix(STEPS).partition(":")[2]
    return text.replace("\\n", "\n") or "\n" if (head or "").startswith(STEPS) else "\n"


def _logit_row(head: str, architecture: Architecture, vocab_size: int) -> int:
    kind, _, row = head.partition(":")
    if kind != "logit" or not row.isdigit():
        raise UnsupportedArchitectureError(
            "head is 'logit:ID' with the id of a vocabulary row, or 'steps:RULE' of a process reward model, not "
            f"{head!r}"
        )
    if not architecture.is_language_model:
        raise UnsupportedArchitectureError(f"head={head!r} is for language models; this checkpoint has its own head")
    if architecture.family in ("gemma", "gemma2", "internlm2"):
        raise UnsupportedArchitectureError(f"head={head!r} is not supported for {architecture.family}")
    if int(row) >= vocab_size:
        raise UnsupportedArchitectureError(f"head={head!r} names no row of the vocabulary of {vocab_size}")
    return int(row)


def _normalization(config: Mapping[str, Any]) -> Normalization | None:
    mean, std = config.get("mean"), config.get("std")
    if mean is None or std is None:
        return None
    if float(std) <= 0:
        raise ValueError(f"std is {std}, not a positive number")
    return Normalization(float(mean), float(std))


def _activation(config: Mapping[str, Any], family: Family) -> Activation:
    """Gemma's "gelu" is the tanh approximation whatever it is called (Transformers' `GemmaConfig` says the same)."""
    if family in ("gemma", "gemma2"):
        found = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
        if found in ("gelu", "gelu_pytorch_tanh"):
            return "gelu_tanh"
        raise UnsupportedArchitectureError(f"hidden_act {found!r} is not supported; 'gelu_pytorch_tanh' is")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedArchitectureError(f"hidden_act {activation!r} is not supported; 'silu' is")
    return "silu"


def _softcap(config: Mapping[str, Any]) -> float | None:
    value = config.get("attn_logit_softcapping", 50.0)
    if value is not None and float(value) <= 0:
        raise ValueError(f"attn_logit_softcapping is {value}, not a positive number")
    return None if value is None else float(value)


def _windows(config: Mapping[str, Any], num_layers: int) -> tuple[Window, ...]:
    """Gemma 2: every other layer, the first included, sees a window, unless `layer_types` says otherwise."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedArchitectureError("use_bidirectional_attention is not supported")
    size = _whole(config, "sliding_window")
    default = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    types = list(config.get("layer_types") or default)
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types is {types}, not one of 'full_attention', 'sliding_attention' for each layer")
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def _num_labels(config: Mapping[str, Any]) -> int:
    if config.get("num_labels") is not None:
        return int(config["num_labels"])
    return len(config.get("id2label") or {0: "", 1: ""})  # Transformers' default is two


def _max_positions(config: Mapping[str, Any], family: Family) -> int:
    """Positions the model attends over in full: a sliding window, where one is on, bounds them exactly."""
    positions = _whole(config, "max_position_embeddings")
    in_use = config.get("use_sliding_window", family == "mistral")
    if not in_use or config.get("sliding_window") is None or family == "gemma2":
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
