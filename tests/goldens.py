"""Golden checkpoints made for this project: random weights, with what the original implementation computes from them.

`reward_model/goldens/` holds eight shapes of InternLM2-Reward, each a `config.json` and a `scores.json`: token ids, and
the float32 scores that the original `modeling_internlm2.py` gives them on Transformers 4.41. `causal` has the logits of
the original's language model. Shapes that differ in their configuration alone share one file of weights, so a
checkpoint is put together where a test wants one. The weights are float16, as they were when they were scored.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parent / "reward_model" / "goldens"
WEIGHTS = {
    "bias": ("gqa", "biases"),
    "gqa": ("gqa",),
    "head-dim-32": ("mha",),
    "mha": ("mha",),
    "mqa": ("mqa",),
    "rope-dynamic": ("gqa",),
    "rope-linear": ("gqa",),
    "theta-1e4": ("gqa",),
}
CAUSAL_WEIGHTS = ("gqa", "lm_head")


def make_golden(name: str, folder: Path) -> Path:
    """Write the reward model of this name to the folder: its configuration, its weights, the original's scores."""
    return _make(name, WEIGHTS[name], folder)


def make_causal_golden(folder: Path) -> Path:
    """Write InternLM2ForCausalLM's golden to the folder: its configuration, its weights, the original's logits."""
    return _make("causal", CAUSAL_WEIGHTS, folder, without="v_head.weight")


def _make(name: str, files: tuple[str, ...], folder: Path, *, without: str | None = None) -> Path:
    shutil.copytree(GOLDENS / name, folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(GOLDENS / "weights" / f"{file}.safetensors")
    if without is not None:
        del weights[without]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
