"""PEFT's LoRA adapters: low-rank changes of a base model's weights, added to them in float32 as they are loaded.

The formulas are those of `peft/tuners/lora/layer.py`: a weight gets `B @ A * scale`, an embedding `(B @ A).T * scale`,
with scale `alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA. Everything else in an adapter's file stands for
the base's tensor of that name (`modules_to_save`, biases, resized embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from serve_app.reward_model.adapter_config import ADAPTER_CONFIG, ADAPTER_FILES, AdapterConfig
from serve_app.reward_model.errors import CheckpointError, WeightError
from serve_app.reward_model.weight_files import first_of, plain_name, stored_tensors

_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")


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
