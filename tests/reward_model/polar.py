"""POLAR-like checkpoints: as InternLM2-Reward, but `<|reward|>` separates trajectories and another token ends them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import processors

from serve_app.reward_model import tiny

__all__ = ["rendered_by_its_client", "write"]

END = "[UNUSED_TOKEN_130]"


def write(folder: Path) -> Path:
    """The embedded model with POLAR's tokens: a turn's end becomes the reward token; the folder."""
    folder.mkdir(exist_ok=True)
    tiny.write(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", END))
    backend = BackendTokenizer.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path))
    config = json.loads((folder / "config.json").read_text())
    config["reward_token_id"] = backend.token_to_id(END)
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rendered_by_its_client(prompt: list[str], reference: list[str], output: list[str]) -> str:
    """The text of POLAR's own client for messages with these contents (wrapper "sft", no special tokens in them)."""
    trajectories = ("\n".join(prompt) + "\n" + "\n".join(answers) for answers in (reference, output))
    return "<|reward|>".join(trajectories) + END
