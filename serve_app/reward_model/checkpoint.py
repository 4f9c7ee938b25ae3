"""Checkpoint folder -> weights: finds them, checks each, and copies them into fused tensors on the device.

Parameters are allocated on the device first; then each shard is opened, its tensors are copied one at a time into
their places, and it is closed. The host never holds more than one shard beside the model. A folder may hold an adapter
instead of a model (`adapters.py`): its base's weights are read, and changed on the way.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.reward_model import tiny
from serve_app.reward_model.adapters import ADAPTER_CONFIG, ADAPTER_FILES, Adapter, AdapterConfig
from serve_app.reward_model.architecture import DecoderConfig, read_json
from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError, WeightError
from serve_app.reward_model.families import ARCHITECTURES, MODEL_TYPES, Family
from serve_app.reward_model.head_weights import HeadPlan
from serve_app.reward_model.weight_files import (
    StoredTensor,
    first_of,
    inventory,
    plain_name,
    stored_tensors,
    weight_files,
)
from serve_app.reward_model.weights import DecoderWeights, Place, allocate, places_of

__all__ = ["DOWNLOADED_FILES", "fill", "fingerprint", "load_weights", "read_config", "resolve", "tokenizer_folder"]

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "tokenizer.model")
DOWNLOADED_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")
# A value head beside a language model's weights, as LLaMA-Factory writes it (`model/model_utils/valuehead.py`), and an
# adapter: both are small, and the configuration follows from them.
VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin")
SIDE_FILES = (*VALUE_HEAD_FILES, *ADAPTER_FILES)
HASHED_FILES = (*DOWNLOADED_FILES, "*.jinja", "*.txt")
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64


def resolve(model: str, revision: str | None, *, weights: bool = True, also: Sequence[str] = ()) -> Path:
    """The folder of a model: the embedded one for `tiny`, `model` itself if it is a folder, else the downloaded
    snapshot of that Hugging Face id, with its configuration and tokenizer alone unless `weights` are wanted. `also`
    holds patterns of further files to download.

    Raises:
        CheckpointError: it is neither a folder nor an id that can be fetched.
    """
    if model == tiny.NAME:
        return tiny.cached_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(f"model folder {model} does not exist")
    from huggingface_hub import snapshot_download

    try:
        patterns = [*(DOWNLOADED_FILES if weights else (*SMALL_FILES, *SIDE_FILES)), *also]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: no network, no such id, no access
        raise CheckpointError(
            f"{model!r} is neither 'tiny', nor a folder, nor a Hugging Face id that could be fetched: {error}"
        ) from error


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
    adapter = _adapter_config(folder, base_model)
    if adapter is None:
        if head is None and first_of(folder, *VALUE_HEAD_FILES) is not None:
            head = "value_head"
        return DecoderConfig.from_folder(folder, head=head, normalize=normalize)
    base = _base_folder(adapter, base_model, weights=False)
    if head is None and first_of(folder, *VALUE_HEAD_FILES) is not None:
        head = "value_head"
    path = base / "config.json"
    raw = _adapted(read_json(path), adapter, has_head=head is not None)
    return DecoderConfig.parse(raw, path=path, head=head, normalize=normalize)


def _adapter_config(folder: Path, base_model: str | None) -> AdapterConfig | None:
    adapter = AdapterConfig.from_folder(folder)
    if adapter is None and base_model is not None:
        raise CheckpointError(f"base_model is for adapters; {folder} holds no {ADAPTER_CONFIG}")
    return adapter


def _base_folder(adapter: AdapterConfig, base_model: str | None, *, weights: bool = True) -> Path:
    """The folder of an adapter's base: its own choice, or `base_model`."""
    base = base_model or adapter.base
    if not base:
        raise CheckpointError(f"{adapter.path} names no base_model_name_or_path; name one with base_model")
    try:
        folder = resolve(base, None if base_model else adapter.base_revision, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapter {adapter.path.parent} cannot be had: {error}; base_model names another place"
        ) from error
    if AdapterConfig.from_folder(folder) is not None:
        raise UnsupportedArchitectureError(f"the base {base} of {adapter.path} is an adapter itself: merge it first")
    return folder


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


def tokenizer_folder(folder: Path, *, base_model: str | None = None) -> Path:
    """The folder to read a model's tokenizer from: its own, or for an adapter without one that of its base."""
    adapter = _adapter_config(folder, base_model)
    if adapter is None or (folder / "tokenizer_config.json").is_file():
        return folder
    return _base_folder(adapter, base_model, weights=False)


def fingerprint(folder: Path, *, weights: bool = True, base_model: str | None = None) -> str:
    """A hash of what decides a score: configuration and tokenizer whole, and of each weight file its size and 64
    samples of 64 kB. It tells one model or fine-tune from another; a change of a few weights may escape it. Without
    `weights` it is that of the files which decide the token ids. That of an adapter covers its base.
    """
    digest = hashlib.sha256()
    files = [path for pattern in (HASHED_FILES if weights else SMALL_FILES) for path in folder.glob(pattern)]
    for path in sorted(files):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            if path.suffix in (".safetensors", ".bin"):
                step = max(SAMPLE_BYTES, path.stat().st_size // NUM_SAMPLES)
                for offset in range(0, path.stat().st_size, step):
                    file.seek(offset)
                    digest.update(file.read(SAMPLE_BYTES))
            else:
                digest.update(file.read())
    adapter = _adapter_config(folder, base_model)
    if adapter is not None:
        base = _base_folder(adapter, base_model, weights=weights)
        digest.update(f"base:{fingerprint(base, weights=weights)}".encode())
    return digest.hexdigest()[:16]


def load_weights(
    folder: Path, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype, base_model: str | None = None
) -> DecoderWeights:
    """Load the weights in `folder` onto `device` as `dtype`; the head is kept in float32.

    An adapter's changes are added in float32, before the sum is rounded to `dtype`.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
        WeightError: a weight is missing, surplus or misshapen.
    """
    source = _Source.of(folder, base_model)
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
    _fill(_Source(folder, tuple(weight_files(folder)), None), places, architecture=architecture)


# What trainers leave in a checkpoint beside the model: the head that a language model's class had, running statistics
# of scores (OpenRLHF keeps those in config.json), counters of batch norms.
LEFT_OVER = ("lm_head.weight", "output.weight", "mean", "std", "normalizer.mean", "normalizer.var", "normalizer.count")
LEFT_OVER_ENDS = ("rotary_emb.inv_freq", ".num_batches_tracked")
# Starling's class has the same layers under two names.
SAVED_TWICE = ("GPTRewardModel",)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a model's tensors come from: `files`, and an adapter that changes them."""

    folder: Path
    files: tuple[Path, ...]
    adapter: Adapter | None

    @classmethod
    def of(cls, folder: Path, base_model: str | None) -> _Source:
        config = _adapter_config(folder, base_model)
        side = first_of(folder, *VALUE_HEAD_FILES)
        base = folder if config is None else _base_folder(config, base_model)
        files = (*weight_files(base), *([] if side is None else [side]))
        return cls(folder, files, None if config is None else Adapter.load(config))

    def inventory(self) -> dict[str, StoredTensor]:
        """Every tensor by its plain name, the adapter's in place of the base's."""
        return inventory(self.files) | dict(self._replacements())

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Plain name and content of every tensor, each to be read before the next one is asked for."""
        replaced = dict(self._replacements())
        for file in self.files:
            with stored_tensors(file) as tensors:
                named = ((plain_name(tensor.name), tensor) for tensor in tensors)
                yield from (item for item in named if item[0] not in replaced)
        yield from replaced.items()

    def _replacements(self) -> Iterator[tuple[str, StoredTensor]]:
        if self.adapter is not None:
            for name, content in self.adapter.replacements.items():
                read = partial(_itself, content)
                yield name, StoredTensor(name, self.adapter.file, tuple(content.shape), read)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fill(source: _Source, places: Mapping[str, Place], *, architecture: str) -> None:
    loaded: dict[str, str] = {}
    for name, tensor in source.tensors():
        if name not in places and _is_left_over(name):
            logger.info("%s in %s is no part of a reward model and is left out", tensor.name, tensor.file.name)
            continue
        if name in loaded and architecture not in SAVED_TWICE:
            raise WeightError(f"weight {name} is there twice, as {loaded[name]} and {tensor.name} ({tensor.file})")
        _put(places, name, tensor, source.adapter, architecture)
        loaded[name] = tensor.name
    adapter = source.adapter
    if adapter is not None and (unused := sorted(adapter.changes.keys() - loaded.keys() - set(LEFT_OVER))):
        raise WeightError(f"the adapter changes {unused[0]}, which its base has not ({adapter.file})")
    if missing := sorted(places.keys() - loaded.keys()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightError(f"missing weights in {source.folder}: {', '.join(missing[:3])}{more}")


def _put(
    places: Mapping[str, Place], name: str, tensor: StoredTensor, adapter: Adapter | None, architecture: str
) -> None:
    place = places.get(name)
    if place is None:
        raise WeightError(f"surplus weight {tensor.name} in {tensor.file.name}: {architecture} has none")
    place.check(tensor.name, tensor.shape, tensor.file.name)
    content: Tensor = tensor.read()
    place.copy(content if adapter is None else adapter.applied(name, content))


def _is_left_over(name: str) -> bool:
    return name in LEFT_OVER or name.endswith(LEFT_OVER_ENDS)
