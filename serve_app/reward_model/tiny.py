"""The embedded default model `tiny`: InternLM2-Reward's architecture at 1.1M seeded random parameters.

It needs no download, so that every door can be tried at once. Its scores mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from serve_app.reward_model.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "tiny"
CACHE_VARIABLE = "RAYWARD_CACHE"
REWARD_TOKEN = "<|reward|>"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", REWARD_TOKEN, "<|im_end|>", "<|im_start|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}" + REWARD_TOKEN
)
WORDS = (
    "the of and to in is that it for on with as was are be this have from or by not what but we you can an your all",
    "will their there which if about would they more when so up out other people time like how could some make then",
    "also them than into only good because does get no my know just think should use user assistant system yes help",
    "please answer question ing tion ed er ly re un est ment ness able",
)
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def cached_folder() -> Path:
    """The folder of the embedded model in the user's cache."""
    return made_once(NAME, write, code=Path(__file__))


def made_once(name: str, make: Callable[[Path], None], *, code: Path) -> Path:
    """The folder of a model that `make` writes, in the user's cache (`$RAYWARD_CACHE`, else `~/.cache/rayward`).

    A model is made on first use, in a folder beside its place and then moved there, so that processes that make it at
    the same time do not meet half a model. `code` is the source file that decides what is in it.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rayward")
    version = hashlib.sha256(code.read_bytes()).hexdigest()[:8]  # a model made by other code is another
    folder = cache.expanduser() / f"{name}-{version}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make(folder, make)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made: {error}; {CACHE_VARIABLE} names another cache") from error
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        make(made)
        made.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process made it meanwhile
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write(folder: Path) -> None:
    """Write the model's files to `folder`: the same bytes each time."""
    tokenizer = _tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["InternLM2ForRewardModel"],
        "model_type": "internlm2",
        "vocab_size": vocab_size,
        "reward_token_id": tokenizer.token_to_id(REWARD_TOKEN),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "bias": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **SHAPE,
    }
    template = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template | named, indent=2))
    from safetensors.torch import save_file  # brings torch

    save_file(_weights(vocab_size), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _tokenizer() -> Tokenizer:
    """A BPE vocabulary: special tokens, the 256 bytes for what has no token, ASCII, and common English words."""
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["\u2581"]
    merges: list[tuple[str, str]] = []
    known = set(pieces)
    for word in " ".join(WORDS).split():
        for text in (word, "\u2581" + word):
            for end in range(2, len(text) + 1):
                if text[:end] not in known:
                    known.add(text[:end])
                    pieces.append(text[:end])
                    merges.append((text[: end - 1], text[end - 1]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    return tokenizer


def _weights(vocab_size: int) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(20260101)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    head_dim = hidden // SHAPE["num_attention_heads"]
    qkv_size = hidden + 2 * SHAPE["num_key_value_heads"] * head_dim

    def normal(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return drawn.mul_(gain / columns**0.5).half()

    ones = torch.ones(hidden).half()
    weights = {"model.tok_embeddings.weight": normal(vocab_size, hidden, 8.0), "model.norm.weight": ones.clone()}
    for index in range(SHAPE["num_hidden_layers"]):
        layer = {
            "attention.wqkv": normal(qkv_size, hidden),
            "attention.wo": normal(hidden, hidden),
            "attention_norm": ones.clone(),
            "feed_forward.w1": normal(inner, hidden),
            "feed_forward.w2": normal(hidden, inner),
            "feed_forward.w3": normal(inner, hidden),
            "ffn_norm": ones.clone(),
        }
        weights |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in layer.items()}
    return weights | {"v_head.weight": normal(1, hidden, 2.0)}
