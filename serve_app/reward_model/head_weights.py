"""A head's weights: found in a checkpoint by their names, whatever its class called them.

A head is a chain of linear layers, with or without biases, ReLU between them, the last of one row, or of two where
there are two labels. `NAMES` are what the
chain is called; `score`, `v_head.summary` and the like may also hold several layers by number, as `score.0`, `score.2`.
A gating head adds the layers of its gate (`heads.py` has the formulas).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig, HeadConfig
from serve_app.reward_model.errors import WeightError
from serve_app.reward_model.weight_files import StoredTensor

NAMES = ("score", "v_head", "v_head.summary", "regression_head", "value_head", "score_head")
"""Transformers, InternLM2 and Starling, TRL and LLaMA-Factory, UltraRM and Eurus, OpenRLHF, Beaver."""
LANGUAGE_HEAD = "lm_head.weight"
TRANSFORM, LOGIT_SCALE = "reward_transform_matrix", "gating.logit_scale"
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """A linear layer in a checkpoint: `weight` is the name of its matrix, `shape` rows and columns."""

    weight: str
    shape: tuple[int, int]
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The layers of a head, in order, and those of its gate; `norms` are batch norms behind the gate's layers."""

    layers: tuple[LinearPlan, ...]
    gate: tuple[LinearPlan, ...] = ()
    norms: tuple[str, ...] = ()
    transforms: bool = False

    @classmethod
    def plain(cls, config: DecoderConfig) -> HeadPlan:
        """One row without a bias."""
        return cls((LinearPlan("score.weight", (1, config.hidden_size)),))

    @classmethod
    def of(cls, config: DecoderConfig, stored: Mapping[str, StoredTensor]) -> HeadPlan:
        """The head that a checkpoint's tensors make.

        Raises:
            WeightError: there is none, or two, or one of another width; it names files and shapes.
        """
        head = config.head
        if head.vocabulary_rows:
            return cls((LinearPlan(LANGUAGE_HEAD, (len(head.vocabulary_rows), config.hidden_size)),))
        if head.kind in ("scalar", "probability", "two_labels"):
            num_rows = 2 if head.kind == "two_labels" else 1
            return cls(_chain(stored, _only_name(head, stored), config.hidden_size, num_rows))
        count = len(head.attributes)
        if head.kind == "weighted":
            rows = _chain(stored, "score", config.hidden_size, 2 * count)
            return cls(rows, _chain(stored, "weights.fc", config.hidden_size, count))
        rows = _chain(stored, "regression_layer", config.hidden_size, count * head.num_quantiles)
        norms = [name.removesuffix(".running_mean") for name in stored if name.endswith(".running_mean")]
        layers = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in norms}
        gate = _chain(layers, "gating.layers", config.hidden_size, count)
        norms = sorted((name for name in norms if name.startswith("gating.layers.")), key=_number)
        if norms and len(norms) != len(gate) - 1:
            raise WeightError(f"gating.layers has {len(gate)} linear layers and {len(norms)} batch norms")
        return cls(rows, gate, tuple(norms), transforms=True)


def _only_name(head: HeadConfig, stored: Mapping[str, StoredTensor]) -> str:
    names = dict.fromkeys((*NAMES, head.prefix) if head.prefix else NAMES)
    found = {name: parts for name in names if (parts := _linears(stored, name))}
    if len(found) > 1:
        shown = ", ".join(
            f"{weight} {list(stored[weight].shape)} in {stored[weight].file.name}"
            for weight in (parts[-1] for parts in found.values())
        )
        raise WeightError(f"two heads: {shown}. A reward model has one: remove the other from the checkpoint")
    if not found:
        files = sorted({tensor.file.name for tensor in stored.values()})
        raise WeightError(
            f"no head in {', '.join(files[:3])}: none of {', '.join(f'{name}.weight' for name in names)} is there. It "
            "gets lost where a model is merged as a language model"
        )
    return next(iter(found))


def _linears(stored: Mapping[str, StoredTensor], name: str) -> list[str]:
    """Names of the matrices of one layer, or of a numbered chain of layers in order."""
    if f"{name}.weight" in stored:
        return [f"{name}.weight"]
    numbered = (key for key in stored if key.startswith(f"{name}.") and key.endswith(".weight"))
    return sorted((key for key in numbered if key.count(".") == name.count(".") + 2 and _is_numbered(key)), key=_number)


def _is_numbered(weight: str) -> bool:
    return weight.removesuffix(".weight").rpartition(".")[2].isdigit()


def _number(name: str) -> int:
    return int(name.removesuffix(".weight").rpartition(".")[2])


def _chain(stored: Mapping[str, StoredTensor], name: str, num_inputs: int, num_outputs: int) -> tuple[LinearPlan, ...]:
    """The linear layers under a name: each takes what the one before gives, the last gives `num_outputs`."""
    weights = _linears(stored, name)
    if not weights:
        raise WeightError(f"missing weights: {name}.weight, the head's, is not there")
    plans = []
    for place, weight in enumerate(weights):
        shape = stored[weight].shape
        last = place == len(weights) - 1
        wanted = (num_outputs if last or len(shape) != 2 else shape[0], num_inputs)
        if shape != wanted:
            raise WeightError(
                f"weight {weight} has shape {list(shape)}; the configuration asks for {list(wanted)} "
                f"({stored[weight].file.name})"
            )
        bias = weight.removesuffix("weight") + "bias"
        if bias in stored and stored[bias].shape != wanted[:1]:
            raise WeightError(
                f"weight {bias} has shape {list(stored[bias].shape)}; the configuration asks for {list(wanted[:1])} "
                f"({stored[bias].file.name})"
            )
        plans.append(LinearPlan(weight, wanted, bias if bias in stored else None))
        num_inputs = wanted[0]
    return tuple(plans)


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """`weight` [rows, columns] and `bias` [rows] in float32."""

    weight: Tensor
    bias: Tensor | None = None

    def moved_to(self, device: torch.device) -> LinearWeights:
        return LinearWeights(self.weight.to(device), None if self.bias is None else self.bias.to(device))


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A batch norm as it is once trained: `(x - mean) / sqrt(var + 1e-5) * weight + bias`, float32 [features]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def moved_to(self, device: torch.device) -> NormWeights:
        return NormWeights(*(part.to(device) for part in (self.weight, self.bias, self.mean, self.var)))


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """All of a head's weights on one device, in float32. `transform` is [attributes, attributes]."""

    layers: tuple[LinearWeights, ...]
    gate: tuple[LinearWeights, ...] = ()
    norms: tuple[NormWeights, ...] = ()
    transform: Tensor | None = None
    logit_scale: Tensor | None = None

    def moved_to(self, device: torch.device) -> HeadWeights:
        return HeadWeights(
            tuple(layer.moved_to(device) for layer in self.layers),
            tuple(layer.moved_to(device) for layer in self.gate),
            tuple(norm.moved_to(device) for norm in self.norms),
            None if self.transform is None else self.transform.to(device),
            None if self.logit_scale is None else self.logit_scale.to(device),
        )


def allocate_head(plan: HeadPlan, *, device: torch.device) -> HeadWeights:
    """Weights of the plan's shapes on the device, their content yet unset."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def linear(layer: LinearPlan) -> LinearWeights:
        return LinearWeights(empty(*layer.shape), None if layer.bias is None else empty(layer.shape[0]))

    def norm(layer: LinearPlan) -> NormWeights:
        return NormWeights(*(empty(layer.shape[0]) for _ in NORM_PARTS))

    num_attributes = plan.gate[-1].shape[0] if plan.gate else 0
    return HeadWeights(
        layers=tuple(linear(layer) for layer in plan.layers),
        gate=tuple(linear(layer) for layer in plan.gate),
        norms=tuple(norm(layer) for _, layer in zip(plan.norms, plan.gate, strict=False)),
        transform=empty(num_attributes, num_attributes) if plan.transforms else None,
        logit_scale=empty(1) if plan.transforms else None,
    )


def head_targets(plan: HeadPlan, weights: HeadWeights) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint names of the head's tensors and where each goes, whole."""
    for planned, linear in zip((*plan.layers, *plan.gate), (*weights.layers, *weights.gate), strict=True):
        yield planned.weight, linear.weight
        if planned.bias is not None and linear.bias is not None:
            yield planned.bias, linear.bias
    for name, norm in zip(plan.norms, weights.norms, strict=True):
        targets = (norm.weight, norm.bias, norm.mean, norm.var)
        yield from ((f"{name}.{part}", target) for part, target in zip(NORM_PARTS, targets, strict=True))
    if weights.transform is not None and weights.logit_scale is not None:
        yield TRANSFORM, weights.transform
        yield LOGIT_SCALE, weights.logit_scale
