"""The embedded models. `tiny` is a toy that was taught the kinds of `lessons`; `tiny-random` knows nothing.

Both are InternLM2-Reward's architecture with 1.2 million parameters, and need no download, so that every door can be
tried at once. The weights of `tiny` are in the package, those of `tiny-random` drawn from a seed; the vocabulary is
made here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve_app.reward_model import lessons
from serve_app.reward_model.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "tiny"
RANDOM_NAME = "tiny-random"
NAMES = (NAME, RANDOM_NAME)
WEIGHTS = Path(__file__).with_name("tiny.safetensors")
SOURCES = (Path(__file__), Path(lessons.__file__), lessons.TEXTS)
CACHE_VARIABLE = "RAYWARD_CACHE"
REWARD_TOKEN = "<|reward|>"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", REWARD_TOKEN, "<|im_end|>", "<|im_start|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}" + REWARD_TOKEN
)
ROLES = ("system", "user", "assistant")
SPACE = "\u2581"
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
}


def note(model: str | None) -> str | None:
    """The line that outputs have on an embedded model; None for any other model."""
    if model == NAME:
        return f"{NAME}: a toy model that knows {', '.join(lessons.KINDS)}; not for real use"
    return f"{RANDOM_NAME}: random weights, whose scores mean nothing" if model == RANDOM_NAME else None


def cached_folder(name: str = NAME) -> Path:
    """The folder of an embedded model in the user's cache."""
    if name == RANDOM_NAME:
        return made_once(name, write_random, sources=SOURCES)
    return made_once(name, write, sources=(*SOURCES, WEIGHTS))


def made_once(name: str, make: Callable[[Path], None], *, sources: Sequence[Path]) -> Path:
    """The folder of a model that `make` writes, in the user's cache (`$RAYWARD_CACHE`, else `~/.cache/rayward`).

    A model is made on first use, in a folder beside its place and then moved there, so that processes that make it at
    the same time do not meet half a model. `sources` are the files that decide what is in it.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rayward")
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
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
    """Write the files of `tiny` to `folder`: the same bytes each time.

    Raises:
        CheckpointError: the weights in the package are of another vocabulary.
    """
    from safetensors import safe_open  # as torch, brought in where weights are

    made = tokenizer()
    with safe_open(WEIGHTS, "pt") as file:
        taught = (file.metadata() or {}).get("vocabulary")
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if taught != vocabulary_hash(made):
        raise CheckpointError(
            f"{WEIGHTS.name} was trained with another vocabulary than that of lessons.py: train it anew"
        )
    _write(folder, made, weights)


def write_random(folder: Path) -> None:
    """Write the files of `tiny-random` to `folder`: the same bytes each time."""
    made = tokenizer()
    _write(folder, made, random_weights(made.get_vocab_size()))


def _write(folder: Path, made: Tokenizer, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    made.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["InternLM2ForRewardModel"],
        "model_type": "internlm2",
        "vocab_size": made.get_vocab_size(),
        "reward_token_id": made.token_to_id(REWARD_TOKEN),
        "max_position_embeddings": 32768,
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
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def tokenizer() -> Tokenizer:
    """A vocabulary of whole words and characters: special tokens, the 256 bytes for what has no token, ASCII, and the
    words and characters of the lessons. A word that it lacks is spelt.
    """
    letters = [chr(code) for code in range(0x21, 0x7F)]
    known = [*ROLES, *lessons.words()]
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, SPACE]
    pieces += [SPACE + letter for letter in letters if letter.isalpha()]
    pieces += [form for word in known for form in ((word, SPACE + word) if word.isascii() else (word,))]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}?[A-Za-z]+"), behavior="isolated")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    return made


def vocabulary_hash(made: Tokenizer) -> str:
    """What tells one vocabulary from another."""
    return hashlib.sha256(json.dumps(sorted(made.get_vocab().items())).encode()).hexdigest()[:16]


def random_weights(vocab_size: int) -> dict[str, Tensor]:
    """The weights of `tiny-random` by name, half precision."""
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
