"""PEFT's LoRA adapters: low-rank changes of a base model's weights, added to them in float32 as they are loaded.

The formulas are those of `peft/tuners/lora/layer.py`: a weight gets `B @ A * scale`, an embedding `(B @ A).T * scale`,
with scale `alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA. Everything else in an adapter's file stands for
the base's tensor of that name (`modules_to_save`, biases, resized embeddings).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from serve_app.reward_model.architecture import read_json
from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError, WeightError
from serve_app.reward_model.weight_files import first_of, plain_name, stored_tensors

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILES", "Adapter", "AdapterConfig"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# Options of LoRA that make something else of a weight than B @ A * scale.
REFUSED_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# Initialisations that take their start out of the base's weights, so that the saved base is no longer the right one.
REFUSED_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """An adapter's adapter_config.json: `base` is the id or path of the model that it changes, where it names one."""

    path: Path
    task_type: str | None
    base: str | None
    base_revision: str | None
    alpha: float
    rank_stabilised: bool
    transposed: bool
    alpha_pattern: Mapping[str, float]

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig | None:
        """The folder's adapter_config.json; None where it has a model of its own.

        Raises:
            CheckpointError: it cannot be read.
            UnsupportedArchitectureError: it is not plain LoRA; the message names the type or option.
        """
        path = folder / ADAPTER_CONFIG
        if not path.is_file() or ((folder / "config.json").is_file() and first_of(folder, *ADAPTER_FILES) is None):
            return None
        config = read_json(path)
        _check(config, path)
        try:
            return cls(
                path=path,
                task_type=config.get("task_type"),
                base=config.get("base_model_name_or_path"),
                base_revision=config.get("revision"),
                alpha=float(config["lora_alpha"]),
                rank_stabilised=bool(config.get("use_rslora")),
                transposed=bool(config.get("fan_in_fan_out")),
                alpha_pattern={key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            )
        except KeyError as error:
            raise CheckpointError(f"{path} lacks the field {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} has a field that makes no sense: {error}") from error

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's change: `alpha_pattern` is matched as PEFT's `get_pattern_key` does."""
        patterns = (key for key in self.alpha_pattern if re.match(rf"(.*\.)?({key})$", module))
        key = next(patterns, None)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _check(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedArchitectureError(
            f"the adapter type {kind} of {path} is not supported, LORA is: merge the adapter with PEFT's "
            "merge_and_unload and load what that saves"
        )
    merge = "merge the adapter with PEFT's merge_and_unload and load what that saves"
    for option in REFUSED_OPTIONS:
        if config.get(option):
            raise UnsupportedArchitectureError(f"the adapter option {option} of {path} is not supported: {merge}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REFUSED_STARTS):
        raise UnsupportedArchitectureError(
            f"init_lora_weights {start!r} of {path} changed the base's weights when training began: {merge}"
        )


@dataclass(slots=True)
class Adapter:
    """An adapter in host memory. `replacements` stand for the base's tensors; both are used up as they are applied."""

    config: AdapterConfig
    file: Path
    replacements: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, _Change] = field(default_factory=dict)

    @classmethod
    def load(cls, config: AdapterConfig) -> Adapter:
        """Read the adapter's tensors, which are small.

        Raises:
            CheckpointError: the file is missing or cannot be read.
            WeightError: half of a change is missing.
        """
        folder = config.path.parent
        file = first_of(folder, *ADAPTER_FILES)
        if file is None:
            raise CheckpointError(f"{folder} holds {ADAPTER_CONFIG} and neither of {', '.join(ADAPTER_FILES)}")
        adapter = cls(config, file)
        parts: dict[str, dict[str, Tensor]] = {}
        with stored_tensors(file) as tensors:
            for tensor in tensors:
                if found := _LORA_NAME.fullmatch(tensor.name):
                    weight = plain_name(f"{found['module'].removesuffix('.base_layer')}.weight")
                    parts.setdefault(weight, {})[found["part"]] = tensor.read()
                elif ".lora_" in tensor.name:
                    raise WeightError(f"adapter weight {tensor.name} in {file} is of a kind that is not supported")
                else:
                    adapter.replacements[_replaced_name(tensor.name)] = tensor.read()
        adapter.changes = {weight: _Change.of(weight, halves, file) for weight, halves in parts.items()}
        return adapter

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A base tensor with the adapter's change, in float32 where there is one.

        Raises:
            WeightError: the change does not fit the tensor; both shapes are named.
        """
        change = self.changes.get(name)
        if change is None:
            return tensor
        module = name.removesuffix(".weight")
        delta = change.delta(self.config.scale(module, len(change.low)), transposed=self.config.transposed)
        if delta.shape != tensor.shape:
            raise WeightError(
                f"the adapter's change of {name} has shape {list(delta.shape)} ({self.file}) and the base's weight "
                f"{list(tensor.shape)}: it was trained on another base; base_model names the right one"
            )
        return tensor.float() + delta


def _replaced_name(name: str) -> str:
    """The base's name of a tensor that an adapter brings whole: older PEFT versions keep a part of its own in it."""
    return plain_name(
        re.sub(r"\.(modules_to_save|original_module)(\.default)?\.", ".", name).replace(".base_layer.", ".")
    )


@dataclass(frozen=True, slots=True)
class _Change:
    """`low` [r, columns] and `high` [rows, r] of a weight; of an embedding [r, vocabulary] and [hidden, r]."""

    low: Tensor
    high: Tensor
    is_embedding: bool

    @classmethod
    def of(cls, weight: str, halves: Mapping[str, Tensor], file: Path) -> _Change:
        is_embedding = "embedding_A" in halves
        names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        absent = [f"lora_{name}" for name in names if name not in halves]
        if absent:
            raise WeightError(f"the adapter's change of {weight} lacks {absent[0]} ({file})")
        low, high = (halves[name] for name in names)
        if low.ndim != 2 or high.ndim != 2 or len(low) != high.shape[1]:
            raise WeightError(
                f"the adapter's change of {weight} has shapes {list(low.shape)} and {list(high.shape)}, which do not "
                f"multiply ({file})"
            )
        return cls(low, high, is_embedding)

    def delta(self, scale: float, *, transposed: bool) -> Tensor:
        product = self.high.float() @ self.low.float() * scale
        return product.t() if self.is_embedding or transposed else product
