"""The embedded generator `tiny`: InternLM2ForCausalLM on the embedded reward model's trunk. It talks nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from serve_app.reward_model import tiny

if TYPE_CHECKING:
    from torch import Tensor

NAME = tiny.NAME
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cached_folder() -> Path:
    """The folder of the embedded generator in the user's cache."""
    return tiny.made_once(f"{NAME}-generator", _write, code=Path(__file__))


def _write(folder: Path) -> None:
    from safetensors.torch import load_file, save_file  # brings torch

    trunk = tiny.cached_folder()
    shutil.copy(trunk / "tokenizer.json", folder)
    named = json.loads((trunk / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": CHAT_TEMPLATE}, indent=2))
    weights = load_file(trunk / "model.safetensors")
    del weights["v_head.weight"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights["output.weight"] = _head(weights["model.tok_embeddings.weight"], tokenizer)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((trunk / "config.json").read_text()) | {"architectures": ["InternLM2ForCausalLM"]}
    del config["reward_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _head(embedding: Tensor, tokenizer: Tokenizer) -> Tensor:
    """A random head; bytes and special tokens but the end of a turn get logit 0, so that it writes words and ends."""
    import torch

    drawn = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(20260102))
    head = drawn * (2.0 / embedding.shape[1] ** 0.5)
    end = tokenizer.token_to_id("<|im_end|>")
    head[[token for token in range(len(tiny.SPECIAL_TOKENS) + 256) if token != end]] = 0.0
    halved: Tensor = head.half()
    return halved
