"""Checkpoints that differ from the embedded model in one thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

__all__ = ["copied", "reshaped", "retrained"]


def copied(source: Path, folder: Path) -> Path:
    """The same files elsewhere."""
    return Path(shutil.copytree(source, folder))


def retrained(source: Path, folder: Path, *, factor: float = -2.0) -> Path:
    """The same model with its head multiplied, and so its scores; the files of the tokenizer are left out."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    tensors["v_head.weight"] = tensors["v_head.weight"] * factor
    save_file(tensors, folder / "model.safetensors")
    return folder


def reshaped(source: Path, folder: Path, **changes: Any) -> Path:
    """The same files, with fields of the configuration changed."""
    copied(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder
