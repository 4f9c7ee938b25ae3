"""Weight files of a checkpoint: which there are, the tensors in each, and their names without what wraps the model."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve_app.reward_model.errors import CheckpointError

# Containers that trainers put a model in: PEFT, TRL's and LLaMA-Factory's value-head models, DistributedDataParallel,
# Starling's reward models, and the "model." of Transformers' own heads.
WRAPPERS = ("base_model.model.", "pretrained_model.", "module.", "transformer.", "model.")
READ_BLOCK_BYTES = 1 << 24
BODY = ("embed_tokens.", "tok_embeddings.", "layers.", "norm.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a weight file: `name` is as the file has it, `read` brings it into memory."""

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def plain_name(name: str) -> str:
    """A tensor's name as Transformers' classes have it, whatever the model was wrapped in when it was saved."""
    bare = name
    while wrapper := next((wrapper for wrapper in WRAPPERS if bare.startswith(wrapper)), None):
        bare = bare.removeprefix(wrapper)
    return f"model.{bare}" if bare.startswith(BODY) else bare


def weight_files(folder: Path) -> list[Path]:
    """Weight files, safetensors before .bin: those of the index, else the single file.

    Raises:
        CheckpointError: there are none, or the index names what is not there.
    """
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


def first_of(folder: Path, *names: str) -> Path | None:
    """The first of the files that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def inventory(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by its plain name. Their `read` works no longer."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        with stored_tensors(file) as tensors:
            found |= {plain_name(tensor.name): tensor for tensor in tensors}
    return found


@contextmanager
def stored_tensors(path: Path) -> Iterator[Iterator[StoredTensor]]:
    """The tensors of a weight file, to be read as long as it is open; they come from a memory map, one at a time.

    Raises:
        CheckpointError: the file cannot be read.
    """
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
            yield (
                StoredTensor(key, path, tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key))
                for key in keys
            )
    else:
        yield (StoredTensor(key, path, tuple(state[key].shape), partial(state.__getitem__, key)) for key in keys)


@contextmanager
def read_ahead(files: Sequence[Path], *, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Weight files are read into the system's cache by a thread, while others wait for a device's copies.

    What it yields is told which file is used now, by its place; the thread reads that one and the next. Without
    `wanted` nothing is read: for tensors that are only copied in memory, a second reader is in the way.
    """
    is_over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:

        def begin(place: int) -> None:
            first = place + 1 if place else 0
            for file in files[first : place + 2] if wanted else ():
                pool.submit(_read_whole, file, is_over)

        try:
            yield begin
        finally:
            is_over.set()


def _read_whole(file: Path, is_over: threading.Event) -> None:
    """Read a file once, for what the system keeps of it; whoever needs it meets its errors."""
    block = bytearray(READ_BLOCK_BYTES)
    with suppress(OSError), file.open("rb", buffering=0) as opened:
        while not is_over.is_set() and opened.readinto(block):
            pass


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A pickled state dict, without running code from it; files of PyTorch before 1.6 cannot be memory-mapped."""
    mapped = zipfile.is_zipfile(path)
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"weight file {path} holds no plain dictionary of tensors")
    return state
