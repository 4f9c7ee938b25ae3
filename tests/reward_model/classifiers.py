"""Tiny reward models as trainers save them: Transformers' own classes, a byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

__all__ = [
    "CHATML",
    "CORPUS",
    "SPECIALS",
    "change_json",
    "reference",
    "reference_scores",
    "tokenizer_adds",
    "write",
    "write_urm",
]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<s>")
CORPUS = (
    "hello world, how are you today?",
    "the answer is four, and two plus two is four",
    "I do not know",
    "na\u00efve",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)


def write(
    folder: Path,
    *,
    family: str = "Llama",
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = "<pad>",
    template: str | Sequence[Mapping[str, str]] | None = CHATML,
    tokenizer_class: str = "PreTrainedTokenizerFast",
) -> Path:
    """Write a checkpoint with random weights to `folder`; the folder.

    `template` may be a list of named ones, or None for none.
    """
    backend = _byte_level()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    if isinstance(template, str):
        fast.chat_template = template
    fast.save_pretrained(folder)
    settings: dict[str, Any] = {"tokenizer_class": tokenizer_class}
    if template is not None and not isinstance(template, str):
        settings["chat_template"] = [dict(named) for named in template]
    change_json(folder / "tokenizer_config.json", **settings)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=backend.token_to_id(pad) if pad else None,
        bos_token_id=backend.token_to_id(bos) if bos else None,
        eos_token_id=backend.token_to_id(eos),
    )
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


def write_urm(folder: Path) -> Path:
    """The same as a URM, whose head gives five attributes and weighs them; the folder."""
    write(folder)
    weights = load_file(folder / "model.safetensors")
    width = weights.pop("score.weight").shape[1]
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"score.weight": (10, width)}
    for layer, rows in ((0, width), (2, width), (4, 5)):
        shapes |= {f"weights.fc.{layer}.weight": (rows, width), f"weights.fc.{layer}.bias": (rows,)}
    weights |= {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    change_json(
        folder / "config.json",
        architectures=["LlamaForSequenceClassificationWithNormal_Weights"],
        num_labels=10,
        id2label=None,
        label2id=None,
    )
    return folder


def _byte_level() -> BackendTokenizer:
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    return backend


def change_json(path: Path, **fields: Any) -> None:
    """Set `fields` of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tokenizer_adds(folder: Path, *, front: str | None = None, end: str | None = None) -> None:
    """Make the tokenizer put special tokens around every text that it encodes with special tokens."""
    path = folder / "tokenizer.json"
    backend = BackendTokenizer.from_file(str(path))
    pieces = [*([front] if front else []), "$A", *([end] if end else [])]
    named = [(text, backend.token_to_id(text)) for text in (front, end) if text]
    backend.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=named)
    backend.save(str(path))


def reference(folder: Path) -> Any:
    """Transformers' own model of the checkpoint, in float32."""
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


def reference_scores(folder: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Transformers' score of each sequence, alone in its batch."""
    model = reference(folder)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(ids)])).logits.item() for ids in sequences]
