"""The embedded generators: InternLM2ForCausalLM on the trunks of the embedded reward models.

`tiny` was trained together with the reward model, and its head is the embedding: sampled, it answers the reward model's
questions right some of the time. `tiny-random` has a random head, and talks nonsense.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from serve_app.reward_model import tiny

if TYPE_CHECKING:
    from torch import Tensor

NAME = tiny.NAME
NAMES = tiny.NAMES
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cached_folder(name: str = NAME) -> Path:
    """The folder of an embedded generator in the user's cache."""
    sources = (Path(__file__), *tiny.SOURCES, tiny.WEIGHTS)
    return tiny.made_once(f"{name}-generator", partial(_write, name), sources=sources)


def _write(name: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file  # brings torch

    trunk = tiny.cached_folder(name)
    shutil.copy(trunk / "tokenizer.json", folder)
    named = json.loads((trunk / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": CHAT_TEMPLATE}, indent=2))
    weights = load_file(trunk / "model.safetensors")
    del weights["v_head.weight"]
    is_tied = name == NAME
    if not is_tied:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        weights["output.weight"] = _random_head(weights["model.tok_embeddings.weight"], tokenizer)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    architecture = {"architectures": ["InternLM2ForCausalLM"], "tie_word_embeddings": is_tied}
    config = json.loads((trunk / "config.json").read_text()) | architecture
    del config["reward_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _random_head(embedding: Tensor, tokenizer: Tokenizer) -> Tensor:
    """A random head; bytes and special tokens but the end of a turn get logit 0, so that it writes words and ends."""
    import torch

    drawn = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(20260102))
    head = drawn * (2.0 / embedding.shape[1] ** 0.5)
    end = tokenizer.token_to_id("<|im_end|>")
    head[[token for token in range(len(tiny.SPECIAL_TOKENS) + 256) if token != end]] = 0.0
    halved: Tensor = head.half()
    return halved
