"""A model's name -> the folder of its files, and their fingerprint. No torch: `checkpoint.py` reads the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from serve_app.reward_model import tiny
from serve_app.reward_model.errors import CheckpointError

__all__ = ["DOWNLOADED_FILES", "fingerprint", "resolve"]

SMALL_FILES = ("*.json", "tokenizer.model")
DOWNLOADED_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")
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
        patterns = [*(DOWNLOADED_FILES if weights else SMALL_FILES), *also]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: no network, no such id, no access
        raise CheckpointError(
            f"{model!r} is neither 'tiny', nor a folder, nor a Hugging Face id that could be fetched: {error}"
        ) from error


def fingerprint(folder: Path, *, weights: bool = True) -> str:
    """A hash of what decides a score: configuration and tokenizer whole, and of each weight file its size and 64
    samples of 64 kB. It tells one model or fine-tune from another; a change of a few weights may escape it. Without
    `weights` it is that of the files which decide the token ids.
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
    return digest.hexdigest()[:16]
