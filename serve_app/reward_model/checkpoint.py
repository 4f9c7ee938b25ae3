"""Checkpoint folder -> weights: finds them, checks each, and copies them into fused tensors on the device.

Parameters are allocated on the device first; then each shard is opened, its tensors are copied one at a time into
their places, and it is closed. The host never holds more than one shard beside the model; for a card, the system reads
the next one meanwhile, into memory that it may take back. A folder may hold an adapter instead of a model
(`adapters.py`): its base's weights are read, and changed on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.reward_model.adapter_config import ADAPTER_FILES, AdapterConfig
from serve_app.reward_model.adapters import Adapter
from serve_app.reward_model.architecture import DecoderConfig, read_json
from serve_app.reward_model.errors import WeightError
from serve_app.reward_model.families import ARCHITECTURES, MODEL_TYPES, Family
from serve_app.reward_model.fp8_weights import INPUT_SCALE_END, SCALE_ENDS, Fp8Layout
from serve_app.reward_model.head_weights import HeadPlan
from serve_app.reward_model.model_files import VALUE_HEAD_FILES, adapter_config, base_folder, tokenizer_folder
from serve_app.reward_model.steps import label_rows
from serve_app.reward_model.tokenizer import fast_tokenizer
from serve_app.reward_model.weight_files import (
    StoredTensor,
    first_of,
    inventory,
    plain_name,
    read_ahead,
    stored_tensors,
    weight_files,
)
from serve_app.reward_model.weights import DecoderWeights, Place, allocate, places_of

logger = logging.getLogger(__name__)


def read_config(
    folder: Path, *, base_model: str | None = None, head: str | None = None, normalize: bool = False
) -> DecoderConfig:
    """The shape of the model in a folder, or of the one that the folder's adapter makes of its base.

    `base_model` names an adapter's base, an id or a folder, in place of the one it names itself. `head` and `normalize`
    are those of `DecoderConfig.from_dict`.

    Raises:
        CheckpointError: a file is missing or broken, or the base cannot be had.
        UnsupportedArchitectureError: the architecture, the kind of adapter or an option is not supported.
    """
    adapter = adapter_config(folder, base_model)
    if adapter is None:
        if head is None and first_of(folder, *VALUE_HEAD_FILES) is not None:
            head = "value_head"
        return _with_rows(DecoderConfig.from_folder(folder, head=head, normalize=normalize), folder)
    base = base_folder(adapter, base_model, weights=False)
    if head is None and first_of(folder, *VALUE_HEAD_FILES) is not None:
        head = "value_head"
    path = base / "config.json"
    raw = _adapted(read_json(path), adapter, has_head=head is not None)
    config = DecoderConfig.parse(raw, path=path, head=head, normalize=normalize)
    return _with_rows(config, tokenizer_folder(folder, base_model=base_model))


def _with_rows(config: DecoderConfig, folder: Path) -> DecoderConfig:
    """The shape with the vocabulary rows that a process reward model says its scores with, by its tokenizer."""
    if config.head.kind != "two_logits" or config.head.steps is None:
        return config
    backend = fast_tokenizer(folder).backend_tokenizer
    rows = label_rows(config.head.steps, lambda text: backend.encode(text, add_special_tokens=False).ids)
    return replace(config, head=replace(config.head, vocabulary_rows=rows))


_TASK_CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def _adapted(config: Mapping[str, Any], adapter: AdapterConfig, *, has_head: bool) -> Mapping[str, Any]:
    """A base's config.json as the adapter's trainer had it: its class with one label, and its size of vocabulary."""
    changed = dict(config)
    name = str((config.get("architectures") or ["None"])[0])
    is_reward_model = name in ARCHITECTURES and not ARCHITECTURES[name].is_language_model
    suffix = _TASK_CLASSES.get(str(adapter.task_type))
    if suffix is not None and not has_head:
        family = MODEL_TYPES.get(str(config.get("model_type")))
        if not is_reward_model:
            changed["architectures"] = [_class_of(family, suffix) or name]
        changed |= {"num_labels": 1, "id2label": None}
    file = first_of(adapter.path.parent, *ADAPTER_FILES)
    embedding = inventory([file] if file else []).get("model.embed_tokens.weight")
    if embedding is not None:
        changed["vocab_size"] = embedding.shape[0]
    return changed


def _class_of(family: Family | None, suffix: str) -> str | None:
    known = (name for name, found in ARCHITECTURES.items() if found.family == family and name.endswith(suffix))
    return next((name for name in known if ARCHITECTURES[name].counts_labels), None)


def load_weights(
    folder: Path,
    config: DecoderConfig,
    *,
    device: torch.device | Sequence[torch.device],
    dtype: torch.dtype,
    base_model: str | None = None,
) -> DecoderWeights:
    """Load the weights in `folder` onto `device`, or spread over several, as `dtype`; the head is kept in float32.

    An adapter's changes are added in float32, before the sum is rounded to `dtype`.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
        WeightError: a weight is missing, surplus or misshapen.
        DeviceError: there are more devices than layers.
    """
    if config.fp8 is not None:
        logger.warning(
            "%s holds 8-bit floats: its scores are those of the weights that these stand for; servers that round what "
            "goes into each product to 8 bits too give others",
            folder,
        )
    source = _Source.of(folder, base_model, config.fp8)
    stored = source.inventory()
    plan = HeadPlan.of(config, stored)
    weights = allocate(config, device=device, dtype=dtype, head=plan)
    _fill(source, dict(places_of(config, weights, plan, stored)), architecture=config.architecture)
    return weights


def fill(folder: Path, places: Mapping[str, Place], *, architecture: str) -> None:
    """Copy every weight in `folder` to its place, one tensor at a time; `places` have plain names.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
        WeightError: a weight is missing, surplus or misshapen.
    """
    _fill(_Source(folder, tuple(weight_files(folder))), places, architecture=architecture)


# What trainers leave in a checkpoint beside the model: the head that a language model's class had, running statistics
# of scores (OpenRLHF keeps those in config.json), counters of batch norms.
LEFT_OVER = ("lm_head.weight", "output.weight", "mean", "std", "normalizer.mean", "normalizer.var", "normalizer.count")
LEFT_OVER_ENDS = ("rotary_emb.inv_freq", ".num_batches_tracked")
# Starling's class has the same layers under two names.
SAVED_TWICE = ("GPTRewardModel",)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a model's tensors come from: `files`, the scales of those that are 8-bit floats, and an adapter that
    changes them.
    """

    folder: Path
    files: tuple[Path, ...]
    adapter: Adapter | None = None
    fp8: Fp8Layout | None = None

    @classmethod
    def of(cls, folder: Path, base_model: str | None, fp8: Fp8Layout | None = None) -> _Source:
        config = adapter_config(folder, base_model)
        side = first_of(folder, *VALUE_HEAD_FILES)
        base = folder if config is None else base_folder(config, base_model)
        files = (*weight_files(base), *([] if side is None else [side]))
        return cls(folder, files, None if config is None else Adapter.load(config), fp8)

    def inventory(self) -> dict[str, StoredTensor]:
        """Every tensor by its plain name, the adapter's in place of the base's."""
        return inventory(self.files) | dict(self._replacements())

    def scales(self) -> dict[str, Tensor]:
        """The scales of 8-bit matrices by the plain names of the matrices; they are small."""
        found: dict[str, Tensor] = {}
        for file in self.files if self.fp8 is not None else ():
            with stored_tensors(file) as tensors:
                for tensor in tensors:
                    name = plain_name(tensor.name)
                    if name.endswith(SCALE_ENDS):
                        found[f"{name.rpartition('.')[0]}.weight"] = tensor.read()
        return found

    def tensors(self, *, ahead: bool = False) -> Iterator[tuple[str, StoredTensor]]:
        """Plain name and content of every tensor, each to be read before the next one is asked for; `ahead` has the
        next file read meanwhile.
        """
        replaced = dict(self._replacements())
        with read_ahead(self.files, wanted=ahead) as at_file:
            for place, file in enumerate(self.files):
                at_file(place)
                with stored_tensors(file) as tensors:
                    named = ((plain_name(tensor.name), tensor) for tensor in tensors)
                    yield from (item for item in named if item[0] not in replaced and not self._is_scale(item[0]))
        yield from replaced.items()

    def _is_scale(self, name: str) -> bool:
        return self.fp8 is not None and name.endswith((*SCALE_ENDS, INPUT_SCALE_END))

    def _replacements(self) -> Iterator[tuple[str, StoredTensor]]:
        if self.adapter is not None:
            for name, content in self.adapter.replacements.items():
                read = partial(_itself, content)
                yield name, StoredTensor(name, self.adapter.file, tuple(content.shape), read)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fill(source: _Source, places: Mapping[str, Place], *, architecture: str) -> None:
    loaded: dict[str, str] = {}
    scales = source.scales()
    is_for_card = any(target.device.type == "cuda" for place in places.values() for target in place.targets)
    for name, tensor in source.tensors(ahead=is_for_card):
        if name not in places and _is_left_over(name):
            logger.info("%s in %s is no part of a reward model and is left out", tensor.name, tensor.file.name)
            continue
        if name in loaded and architecture not in SAVED_TWICE:
            raise WeightError(f"weight {name} is there twice, as {loaded[name]} and {tensor.name} ({tensor.file})")
        _put(places, name, tensor, source, scales.pop(name, None), architecture)
        loaded[name] = tensor.name
    if scales:
        raise WeightError(f"missing weights in {source.folder}: {min(scales)}, whose scale is there")
    adapter = source.adapter
    if adapter is not None and (unused := sorted(adapter.changes.keys() - loaded.keys() - set(LEFT_OVER))):
        raise WeightError(f"the adapter changes {unused[0]}, which its base has not ({adapter.file})")
    if missing := sorted(places.keys() - loaded.keys()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightError(f"missing weights in {source.folder}: {', '.join(missing[:3])}{more}")


def _put(
    places: Mapping[str, Place],
    name: str,
    tensor: StoredTensor,
    source: _Source,
    scale: Tensor | None,
    architecture: str,
) -> None:
    place = places.get(name)
    if place is None:
        raise WeightError(f"surplus weight {tensor.name} in {tensor.file.name}: {architecture} has none")
    place.check(tensor.name, tensor.shape, tensor.file.name)
    content: Tensor = tensor.read()
    if source.fp8 is not None:
        content = source.fp8.weight(tensor.name, content, scale)
    if not content.is_floating_point() or content.itemsize == 1:
        kind = str(content.dtype).removeprefix("torch.")
        raise WeightError(f"weight {tensor.name} in {tensor.file.name} is of {kind}, and config.json names no scales")
    place.copy(content if source.adapter is None else source.adapter.applied(name, content))


def check_weight_files(folder: Path, *, base_model: str | None = None) -> None:
    """Open each weight file of the model in `folder`, an adapter's base included, and read its header, no tensor.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
    """
    for file in _Source.of(folder, base_model).files:
        with stored_tensors(file):
            pass


def _is_left_over(name: str) -> bool:
    return name in LEFT_OVER or name.endswith(LEFT_OVER_ENDS)
