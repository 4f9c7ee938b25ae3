"""A model's name -> the folder of its files, and their fingerprint. No torch: `checkpoint.py` reads the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from serve_app.reward_model import tiny
from serve_app.reward_model.adapter_config import ADAPTER_CONFIG, ADAPTER_FILES, AdapterConfig
from serve_app.reward_model.errors import CheckpointError, UnsupportedArchitectureError

# Configuration, vocabulary and chat templates: Transformers 5 writes a template into a file of its own alone.
SMALL_FILES = ("*.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "vocab.txt")
DOWNLOADED_FILES = (*SMALL_FILES, "*.safetensors", "*.bin")
# A value head beside a language model's weights, as LLaMA-Factory writes it (`model/model_utils/valuehead.py`), and an
# adapter: both are small, and the configuration follows from them.
VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin")
SIDE_FILES = (*VALUE_HEAD_FILES, *ADAPTER_FILES)
HASHED_FILES = (*DOWNLOADED_FILES, "*.txt")
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64


def resolve(model: str | Path, revision: str | None, *, weights: bool = True, also: Sequence[str] = ()) -> Path:
    """The folder of a model: an embedded one for `tiny` and `tiny-random`, `model` itself if it is a folder, else the
    downloaded snapshot of that Hugging Face id, with its configuration and tokenizer alone unless `weights` are wanted.
    `also` holds patterns of further files to download.

    Raises:
        CheckpointError: it is neither a folder nor an id that can be fetched.
    """
    if isinstance(model, str) and model in tiny.NAMES:
        return tiny.cached_folder(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or folder.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(
            f"model folder {model} does not exist; name a folder with a config.json, or a Hugging Face id as text"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = [*(DOWNLOADED_FILES if weights else (*SMALL_FILES, *SIDE_FILES)), *also]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: no network, no such id, no access
        raise CheckpointError(
            f"{model!r} is neither 'tiny', nor a folder, nor a Hugging Face id that could be fetched: {error}"
        ) from error


def adapter_config(folder: Path, base_model: str | None) -> AdapterConfig | None:
    """The adapter in a folder; None where it holds a model. Raises `CheckpointError` where `base_model` has no use."""
    adapter = AdapterConfig.from_folder(folder)
    if adapter is None and base_model is not None:
        raise CheckpointError(f"base_model is for adapters; {folder} holds no {ADAPTER_CONFIG}")
    return adapter


def base_folder(adapter: AdapterConfig, base_model: str | None, *, weights: bool = True) -> Path:
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


def tokenizer_folder(folder: Path, *, base_model: str | None = None) -> Path:
    """The folder to read a model's tokenizer from: its own, or for an adapter without one that of its base."""
    adapter = adapter_config(folder, base_model)
    if adapter is None or (folder / "tokenizer_config.json").is_file():
        return folder
    return base_folder(adapter, base_model, weights=False)


def fingerprint(
    folder: Path,
    *,
    weights: bool = True,
    chat_template: str | None = None,
    base_model: str | None = None,
    head: str | None = None,
    normalize: bool = False,
) -> str:
    """A hash of what decides a score: configuration and tokenizer whole, and of each weight file its size and 64
    samples of 64 kB. It tells one model or fine-tune from another; a change of a few weights may escape it. Without
    `weights` it is that of the files which decide the token ids.

    What stands for something of the checkpoint counts: a `chat_template`, the base of an adapter, and with `weights`
    the options of the head, `head` and `normalize`.
    """
    digest = hashlib.sha256()
    if chat_template is not None:
        digest.update(f"chat template:{len(chat_template)}:{chat_template}".encode())
    if weights and (head is not None or normalize):
        digest.update(f"head:{head}:{normalize}".encode())
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
    adapter = adapter_config(folder, base_model)
    if adapter is not None:
        base = base_folder(adapter, base_model, weights=weights)
        digest.update(f"base:{fingerprint(base, weights=weights)}".encode())
    return digest.hexdigest()[:16]
