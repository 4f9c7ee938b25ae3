"""Checkpoint folder -> Decoder: finds the weights, checks each, and copies them into fused tensors on the device.

Parameters are allocated on the device first; then each shard is opened, its tensors are copied one at a time into
their places, and it is closed. The host never holds more than one shard beside the model.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.errors import CheckpointError, WeightError
from serve_app.reward_model.model_files import fingerprint, resolve
from serve_app.reward_model.weights import DecoderWeights, Place, allocate, places_of

__all__ = ["check_weight_files", "fill", "fingerprint", "load_weights", "resolve"]


def load_weights(folder: Path, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype) -> DecoderWeights:
    """Load the weights in `folder` onto `device` as `dtype`; the head is kept in float32.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
        WeightError: a weight is missing, surplus or misshapen.
    """
    weights = allocate(config, device=device, dtype=dtype)
    fill(folder, dict(places_of(config, weights)), architecture=config.architecture)
    return weights


def fill(folder: Path, places: Mapping[str, Place], *, architecture: str) -> None:
    """Copy every weight in `folder` to its place, one tensor at a time.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
        WeightError: a weight is missing, surplus or misshapen.
    """
    loaded: set[str] = set()
    for shard in _shards(folder):
        with _open_shard(shard) as tensors:
            for name, shape, read in tensors:
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old Transformers versions saved; it follows from the configuration
                place = places.get(name)
                if place is None:
                    raise WeightError(f"surplus weight {name} in {shard.name}: {architecture} has none")
                place.check(name, shape)
                place.copy(read())
                loaded.add(name)
    if missing := sorted(places.keys() - loaded):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightError(f"missing weights in {folder}: {', '.join(missing[:3])}{more}")


def check_weight_files(folder: Path) -> None:
    """Open each weight file in `folder` and read its header, and no tensor.

    Raises:
        CheckpointError: there are no weight files, or one cannot be read.
    """
    for shard in _shards(folder):
        with _open_shard(shard):
            pass


def _shards(folder: Path) -> list[Path]:
    """Weight files, safetensors before .bin: those of the index, else the single file."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                absent = [name for name in names if not (folder / name).is_file()]
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is not a weight index: {error}") from error
            if absent:
                raise CheckpointError(f"{index.name} names {len(names)} files; missing in {folder}: {absent}")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise CheckpointError(f"no model.safetensors, pytorch_model.bin or index of either in {folder}")


_NamedTensors = Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]


@contextmanager
def _open_shard(path: Path) -> Iterator[_NamedTensors]:
    """Name, shape and reader of each tensor in a weight file; tensors come from a memory map, one at a time."""
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            keys = file.keys()
        else:
            state = _load_bin(path)
            keys = state.keys()
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"weight file {path} cannot be read: {error}") from error
    if path.suffix == ".safetensors":
        with file:
            yield ((key, tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key)) for key in keys)
    else:
        yield ((key, tuple(state[key].shape), partial(state.__getitem__, key)) for key in keys)


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, without running code from it; files of PyTorch before 1.6 cannot be memory-mapped."""
    mapped = zipfile.is_zipfile(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"weight file {path} holds no plain dictionary of tensors")
    return state
