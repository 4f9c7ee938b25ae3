"""Tiny process reward models, one of each kind, and their scores by the authors' public code and Transformers' classes.

References read padded batches, as that code does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tests.reward_model import classifiers
from tests.reward_model.tiny_checkpoints import drawn

__all__ = ["ANSWERS", "KINDS", "QUESTION", "Kind", "reference"]

QUESTION = "hello, what is two plus two?"
ANSWERS = (
    ["two plus two is four.", "so the answer is four"],
    ["I do not know.", "two plus two is five?", "no, four", "the answer is four"],
)
TAG = "\u043a\u0438"
CORPUS = (*classifiers.CORPUS, f"one {TAG} two + three - four {TAG}", "hello + hello - ")


@dataclass(frozen=True)
class Kind:
    """A rule's model family, how its checkpoint is written, the option that names it, and its public reading."""

    write: Callable[[Path], Path]
    read: Callable[[Path, Sequence[Sequence[str]]], list[list[float]]]
    head: str | None = None


def _tokenizer(monkeypatch: pytest.MonkeyPatch, adds_space: bool) -> None:
    """A tokenizer with the tokens that the rules look for; it `adds_space` in front of texts as SentencePiece does."""

    def build() -> BackendTokenizer:
        backend = BackendTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[*classifiers.SPECIALS, "<extra_0>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(CORPUS * 20, trainer)
        return backend

    monkeypatch.setattr(classifiers, "_byte_level", build)


def _base(folder: Path, family: str, *, adds_space: bool = False, **options: Any) -> tuple[dict[str, Tensor], int]:
    """The body's weights of a checkpoint in `folder`, and its hidden size."""
    with pytest.MonkeyPatch.context() as patch:
        _tokenizer(patch, adds_space)
        classifiers.write(folder, family=family, **options)
    weights = load_file(folder / "model.safetensors")
    return weights, weights.pop("score.weight").shape[1]


def _save(folder: Path, weights: dict[str, Tensor], architecture: str, num_labels: int) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    fields: dict[str, Any] = {"num_labels": num_labels, "id2label": None, "label2id": None}
    classifiers.change_json(folder / "config.json", architectures=[architecture], **fields)
    return folder


def _write_qwen(folder: Path) -> Path:
    weights, width = _base(folder, "Qwen2")
    shapes = {"score.0.weight": (width, width), "score.0.bias": (width,), "score.2.weight": (2, width)}
    weights |= {name: drawn(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    return _save(folder, weights | {"score.2.bias": torch.tensor([0.2, -0.1])}, "Qwen2ForProcessRewardModel", 2)


def _write_skywork(folder: Path) -> Path:
    weights, width = _base(folder, "Qwen2", bos="<s>", template=None)
    head = {"v_head.summary.weight": drawn(1, width, seed=3), "v_head.summary.bias": torch.tensor([0.3])}
    left = {"lm_head.weight": drawn(len(weights["model.embed_tokens.weight"]), width, seed=4)}
    return _save(folder, weights | head | left, "Qwen2ForPrmModel", 1)


def _write_trl(folder: Path) -> Path:
    weights, width = _base(folder, "Llama", bos="<s>", template=None)
    head = {"score.weight": drawn(2, width, seed=5), "score.bias": torch.tensor([-0.1, 0.4])}
    return _save(folder, weights | head, "LlamaForTokenClassification", 2)


def _write_language_model(folder: Path, family: str, **options: Any) -> Path:
    weights, width = _base(folder, family, **options)
    rows = drawn(len(weights["model.embed_tokens.weight"]), width, seed=6) * 3
    return _save(folder, weights | {"lm_head.weight": rows}, f"{family}ForCausalLM", 1)


def _write_shepherd(folder: Path) -> Path:
    _write_language_model(folder, "Mistral", adds_space=True, bos="<s>", template=None)
    classifiers.tokenizer_adds(folder, front="<s>")
    return folder


def _write_rlhflow(folder: Path) -> Path:
    return _write_language_model(folder, "Llama")


def _states(folder: Path, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The last hidden states of a padded batch: [sequences, tokens, hidden]."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    states: Tensor = _run(model, sequences).last_hidden_state
    return states


def _run(model: Any, sequences: Sequence[Sequence[int]]) -> Any:
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask)


def _picked(scores: Tensor, flags: Sequence[Sequence[bool]]) -> list[list[float]]:
    """The scores [sequences, tokens] where a flag stands."""
    rows = zip(scores.tolist(), flags, strict=True)
    return [[score for score, is_read in zip(row, own, strict=False) if is_read] for row, own in rows]


def _read_qwen(folder: Path, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tag = tokenizer.encode("<extra_0>")[0]
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
            ],
            tokenize=False,
        )
        for steps in answers
    ]
    sequences = [tokenizer.encode(text) for text in texts]
    weights = load_file(folder / "model.safetensors")
    hidden = F.relu(F.linear(_states(folder, sequences), weights["score.0.weight"], weights["score.0.bias"]))
    logits = F.linear(hidden, weights["score.2.weight"], weights["score.2.bias"])
    return _picked(logits.softmax(dim=-1)[..., 1], [[token == tag for token in ids] for ids in sequences])


def _read_skywork(folder: Path, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sequences, flags = [], []
    for steps in answers:
        ids = tokenizer.encode(tokenizer.bos_token + QUESTION + "\n")
        flag = [False] * len(ids)
        for step in steps:
            own = [*tokenizer.encode(step), tokenizer.encode("\n")[-1]]
            ids += own
            flag += [False] * (len(own) - 1) + [True]
        sequences.append(ids)
        flags.append(flag)
    weights = load_file(folder / "model.safetensors")
    head = weights["v_head.summary.weight"], weights["v_head.summary.bias"]
    return _picked(torch.sigmoid(F.linear(_states(folder, sequences), *head)[..., 0]), flags)


def _read_trl(folder: Path, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    separator = tokenizer.encode("\n", add_special_tokens=False)
    sequences, flags = [], []
    for steps in answers:
        ids = [tokenizer.bos_token_id, *tokenizer(QUESTION, add_special_tokens=False)["input_ids"]]
        flag = [False] * len(ids)
        for step in steps:
            own = tokenizer(step, add_special_tokens=False)["input_ids"] + separator
            ids += own
            flag += [False] * (len(own) - 1) + [True]
        sequences.append(ids)
        flags.append(flag)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32, num_labels=2)
    return _picked(_run(model.eval(), sequences).logits.softmax(dim=-1)[..., 1], flags)


def _language_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _read_shepherd(folder: Path, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    candidates = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode(TAG)[-1]
    texts = [f"{QUESTION} " + "\n".join(f"{step} {TAG}" for step in steps) for steps in answers]
    sequences = [tokenizer.encode(text) for text in texts]
    scores = _run(_language_model(folder), sequences).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
    return _picked(scores, [[token == tag for token in ids] for ids in sequences])


def _read_rlhflow(folder: Path, answers: Sequence[Sequence[str]]) -> list[list[float]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
    model = _language_model(folder)
    found = []
    for steps in answers:
        messages: list[dict[str, str]] = []
        scores = []
        for place, step in enumerate(steps):
            text = f"{QUESTION} {step}" if place == 0 else step
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
            ids = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))
            scores.append(_run(model, [ids]).logits[0, -3, candidates].softmax(dim=-1)[0].item())
        found.append(scores)
    return found


KINDS = {
    "qwen": Kind(_write_qwen, _read_qwen),
    "skywork": Kind(_write_skywork, _read_skywork),
    "trl": Kind(_write_trl, _read_trl, "steps:trl"),
    "shepherd": Kind(_write_shepherd, _read_shepherd, "steps:shepherd"),
    "rlhflow": Kind(_write_rlhflow, _read_rlhflow, "steps:rlhflow"),
}


def reference(kind: str, folder: Path, answers: Sequence[Sequence[str]] = ANSWERS) -> list[list[float]]:
    """The scores of each answer's steps, as the kind's authors read them."""
    return KINDS[kind].read(folder, answers)
