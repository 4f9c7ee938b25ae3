"""A model's name -> the folder of its files, and their fingerprint. No torch: `checkpoint.py` reads the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from serve_app.reward_model import tiny
from serve_app.reward_model.errors import CheckpointError

__all__ = ["DOWNLOADED_FILES", "fingerprint", "resolve"]

# Configuration, vocabulary and chat templates: Transformers 5 writes a template into a file of its own alone.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt")
DOWNLOADED_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")
HASHED_FILES = (*DOWNLOADED_FILES, "*.txt")
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64


def resolve(model: str | Path, revision: str | None, *, weights: bool = True, also: Sequence[str] = ()) -> Path:
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
    if isinstance(model, Path) or folder.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(
            f"model folder {model} does not exist; name a folder with a config.json, or a Hugging Face id as text"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*(DOWNLOADED_FILES if weights else SMALL_FILES), *also]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: no network, no such id, no access
        raise CheckpointError(
            f"{model!r} is neither 'tiny', nor a folder, nor a Hugging Face id that could be fetched: {error}"
        ) from error


def fingerprint(folder: Path, *, weights: bool = True, chat_template: str | None = None) -> str:
    """A hash of what decides a score: configuration and tokenizer whole, and of each weight file its size and 64
    samples of 64 kB. It tells one model or fine-tune from another; a change of a few weights may escape it. Without
    `weights` it is that of the files which decide the token ids. A `chat_template` in place of the checkpoint's counts.
    """
    digest = hashlib.sha256()
    if chat_template is not None:
        digest.update(f"chat template:{len(chat_template)}:{chat_template}".encode())
    files = {path for pattern in (HASHED_FILES if weights else SMALL_FILES) for path in folder.glob(pattern)}
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
