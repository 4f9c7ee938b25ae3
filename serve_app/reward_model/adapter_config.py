"""AdapterConfig: a PEFT adapter's adapter_config.json, checked. No torch: `adapters.py` reads the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.reward_model.architecture import read_json
from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError

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
        if not path.is_file() or (
            (folder / "config.json").is_file() and not any((folder / name).is_file() for name in ADAPTER_FILES)
        ):
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
