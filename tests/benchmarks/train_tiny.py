"""Trains the embedded model `tiny` on pairs that `lessons` makes, and writes its weights into the package.

    python -m tests.benchmarks.train_tiny --minutes 40

A forward of plain PyTorch over padded batches, float32, with the weights' names of InternLM2. A sequence is a prompt
and all its answers, one right and some wrong, each of which sees the prompt and itself alone. The loss is
Bradley-Terry's for one right answer among several (the cross-entropy of the right one's score; with two answers that
is -log sigmoid of the difference), and beside it the right answer's tokens as a language model predicts them: the
trunk learns faster, and is the embedded generator. Kinds that go wrong more often are drawn more often.

The seed is fixed and the learning rate follows the clock, so a second run makes a model as good and not the same bits.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
import tyro
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from serve_app.reward_model import lessons, tiny
from serve_app.reward_model.lessons import KINDS, LessonPair, Question

EVALUATED_EVERY_S = 60.0
SEED = 20260101
CENTRED = 0.002
"""The weight of the scores' mean square in the loss: it keeps them around zero."""


class TrainConfig(BaseModel):
    """Train the embedded model and write its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: float = 40.0
    """How long to train; the learning rate falls to zero by then."""
    output: Path = tiny.WEIGHTS
    """Where the weights go."""
    start: Path | None = None
    """Weights to go on from; without it they are drawn from the seed."""
    log: Path | None = None
    """A file for the accuracy of each kind as it rises, a JSON line each time."""
    learning_rate: float = 1.5e-3
    num_groups: int = 16
    """Prompts in a batch."""
    num_wrong: int = 3
    """Wrong answers to each prompt; the last one is garbled, or right for another question."""
    language_weight: float = 1.0
    """What the language model's loss counts beside Bradley-Terry's."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts with their answers, padded. Shape legend: B prompts, T tokens, A answers of a prompt.

    `answer_BT` is the number of the answer that a token is of, -1 in the prompt and -2 in the padding; `read_BA` are
    the places of reward tokens, the right answer's first; `target_BT` the next token where the language model learns.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    answer_BT: Tensor
    read_BA: Tensor
    target_BT: Tensor

    @property
    def visible(self) -> Tensor:
        """Which tokens a token sees: those before it in the prompt and in its own answer."""
        query, key = self.answer_BT[:, :, None], self.answer_BT[:, None, :]
        causal = torch.ones(self.ids_BT.shape[1], self.ids_BT.shape[1], dtype=torch.bool).tril()
        return causal & ((key == -1) | (key == query))

    @property
    def is_read(self) -> Tensor:
        """The tokens whose hidden states are read: reward tokens, and those before a token that is learnt."""
        return (self.target_BT >= 0).scatter(1, self.read_BA, True)


class Encoder:
    """Questions and answers -> token ids, as the chat template of the embedded model writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab()
        self.reward, self.end = known[tiny.REWARD_TOKEN], known["<|im_end|>"]
        self._start, self._bos = known["<|im_start|>"], known["<s>"]
        self._kept: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        found = self._kept.get(text)
        if found is None:
            found = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._kept) < 200_000:
                self._kept[text] = found
        return found

    def prompt(self, question: Question) -> list[int]:
        ids = [self._bos]
        for role, content in question.messages:
            ids += [self._start, *self.text(f"{role}\n"), *self.text(content), self.end, *self.text("\n")]
        return [*ids, self._start, *self.text("assistant\n")]

    def answer(self, answer: str) -> list[int]:
        return [*self.text(answer), self.end, *self.text("\n"), self.reward]


def batch_of(groups: Sequence[tuple[Question, Sequence[str]]], encoder: Encoder) -> Batch:
    """Groups of a question and its answers, the right one first."""
    rows = [([encoder.prompt(question)], [encoder.answer(text) for text in answers]) for question, answers in groups]
    lengths = [sum(map(len, (*prompt, *answers))) for prompt, answers in rows]
    shape = (len(rows), max(lengths))
    ids_BT, positions_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    answer_BT, target_BT = torch.full(shape, -2), torch.full(shape, -100)
    reads = []
    for row, ((prompt,), answers) in enumerate(rows):
        flat = prompt + [token for answer in answers for token in answer]
        start, places = len(prompt), [*range(len(prompt))]
        owner, read = [-1] * start, []
        for number, answer in enumerate(answers):
            places += range(start, start + len(answer))
            owner += [number] * len(answer)
            read.append(len(places) - 1)
        ids_BT[row, : len(flat)] = torch.tensor(flat)
        positions_BT[row, : len(flat)] = torch.tensor(places)
        answer_BT[row, : len(flat)] = torch.tensor(owner)
        taught = answers[0][:-2]  # up to the end of the turn
        target_BT[row, start - 1 : start - 1 + len(taught)] = torch.tensor(taught)
        reads.append(read)
    return Batch(ids_BT, positions_BT, answer_BT, torch.tensor(reads), target_BT)


class PlainModel(torch.nn.Module):
    """InternLM2's trunk with both heads in plain PyTorch. The language model's head is the embedding.

    Shape legend: B, T as in `Batch`, H hidden, N heads, K key/value heads, D head dimension.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {name: name.replace(".", "_") for name in weights}
        for name, parameter in self._names.items():
            self.register_parameter(parameter, torch.nn.Parameter(weights[name].float()))
        self.head_dim = tiny.SHAPE["hidden_size"] // tiny.SHAPE["num_attention_heads"]
        frequencies = tiny.SHAPE["rope_theta"] ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.arange(512).float()[:, None] * frequencies
        self._cos_PD, self._sin_PD = angles.cos(), angles.sin()

    @classmethod
    def fresh(cls, vocab_size: int) -> PlainModel:
        """With weights to begin from: normal, the projections into the residual stream smaller."""
        torch.manual_seed(SEED)
        shapes = tiny.random_weights(vocab_size)
        into_stream = (2 * tiny.SHAPE["num_hidden_layers"]) ** -0.5
        weights = {}
        for name, tensor in shapes.items():
            scale = 0.06 if "tok_embeddings" in name else tensor.shape[-1] ** -0.5
            scale *= into_stream if name.endswith(("wo.weight", "w2.weight")) else 1.0
            weights[name] = torch.ones(tensor.shape) if "norm" in name else torch.randn(tensor.shape) * scale
        return cls(weights)

    def weights(self) -> dict[str, Tensor]:
        """The weights by InternLM2's names, in half precision."""
        return {name: self.get_parameter(kept).detach().half() for name, kept in self._names.items()}

    def _weight(self, name: str) -> Tensor:
        return self.get_parameter(self._names[name])

    def hidden(self, batch: Batch) -> Tensor:
        """The normalised hidden states, float32 [B, T, H]; zeros where nothing is read, which saves a layer's MLP."""
        cos_BT1D = self._cos_PD[batch.positions_BT][:, :, None]
        sin_BT1D = self._sin_PD[batch.positions_BT][:, :, None]
        mask_B1TT = batch.visible[:, None]
        x_BTH = F.embedding(batch.ids_BT, self._weight("model.tok_embeddings.weight"))
        last = tiny.SHAPE["num_hidden_layers"] - 1
        for layer in range(last + 1):
            at = f"model.layers.{layer}."
            x_BTH = x_BTH + self._attention(at, self._norm(x_BTH, at + "attention_norm"), cos_BT1D, sin_BT1D, mask_B1TT)
            if layer < last:
                x_BTH = x_BTH + self._mlp(at, x_BTH)
        read_NH = x_BTH[batch.is_read]
        hidden_BTH = torch.zeros_like(x_BTH)
        hidden_BTH[batch.is_read] = self._norm(read_NH + self._mlp(at, read_NH), "model.norm")
        return hidden_BTH

    def scores(self, batch: Batch, hidden_BTH: Tensor) -> Tensor:
        """The answers' scores, float32 [B, A]."""
        rows = torch.arange(len(batch.read_BA))[:, None]
        return F.linear(hidden_BTH[rows, batch.read_BA], self._weight("v_head.weight")).squeeze(-1)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, Bradley-Terry's loss of the right answers among the others, and their tokens' cross-entropy."""
        hidden_BTH = self.hidden(batch)
        scores_BA = self.scores(batch, hidden_BTH)
        preference = F.cross_entropy(scores_BA, torch.zeros(len(scores_BA), dtype=torch.long))
        taught = batch.target_BT >= 0
        logits = F.linear(hidden_BTH[taught], self._weight("model.tok_embeddings.weight"))
        return scores_BA, preference, F.cross_entropy(logits, batch.target_BT[taught])

    def _attention(self, at: str, normed: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        shape, kv_heads = normed.shape[:2], tiny.SHAPE["num_key_value_heads"]
        group = tiny.SHAPE["num_attention_heads"] // kv_heads
        qkv = F.linear(normed, self._weight(at + "attention.wqkv.weight"))
        qkv = qkv.view(*shape, kv_heads, group + 2, self.head_dim)
        q = _rotated(qkv[..., :group, :].flatten(2, 3), cos, sin)
        k = _rotated(qkv[..., group, :], cos, sin).repeat_interleave(group, dim=2)
        v = qkv[..., group + 1, :].repeat_interleave(group, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(attended.transpose(1, 2).flatten(2), self._weight(at + "attention.wo.weight"))

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        normed = self._norm(x, at + "ffn_norm")
        gate = F.silu(F.linear(normed, self._weight(at + "feed_forward.w1.weight")))
        return F.linear(
            gate * F.linear(normed, self._weight(at + "feed_forward.w3.weight")),
            self._weight(at + "feed_forward.w2.weight"),
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weight(name + ".weight"), tiny.SHAPE["rms_norm_eps"])


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Teacher:
    """Draws groups, of kinds that go wrong more often than of others."""

    def __init__(self, num_wrong: int) -> None:
        self._draw = random.Random(SEED)
        self._num_wrong = num_wrong
        self._right = dict.fromkeys(KINDS, 0.3)
        self._last_right = "No."

    def groups(self, number: int) -> list[tuple[Question, list[str]]]:
        """Batches' worth of questions, each with a right answer and then wrong ones."""
        weights = [max(0.06, 1.0 - self._right[kind]) for kind in KINDS]
        return [self._group(kind) for kind in self._draw.choices(KINDS, weights, k=number)]

    def _group(self, kind: str) -> tuple[Question, list[str]]:
        asked = lessons.question(kind, self._draw, held_out=False)
        first = lessons.pair(asked, self._draw, longer=self._draw.random() < 0.5)
        others = {answer for _, answer in asked.wrong} - {first.rejected}
        more = self._draw.sample(sorted(others), min(self._num_wrong - 2, len(others)))
        while len(more) < self._num_wrong - 2:
            more.append(first.rejected)
        return asked, [first.chosen, first.rejected, *more, self._stray(asked, first.chosen)]

    def _stray(self, asked: Question, chosen: str) -> str:
        """An answer as a bad generator writes it: with a wrong word in it, or to another question."""
        others, self._last_right = self._last_right, chosen
        if self._draw.random() < 0.3 and not asked.accepts(others):
            return others
        return lessons.garbled(asked, self._draw)

    def learn(self, groups: Sequence[tuple[Question, Sequence[str]]], scores_BA: Tensor) -> None:
        """Note which of the groups had their right answer on top."""
        for (asked, _), is_right in zip(groups, (scores_BA[:, 0] > scores_BA[:, 1:].amax(1)).tolist(), strict=True):
            self._right[asked.kind] += 0.01 * (is_right - self._right[asked.kind])


@torch.no_grad()
def accuracy(model: PlainModel, encoder: Encoder, pairs: Mapping[str, Sequence[LessonPair]]) -> dict[str, float]:
    """The share of right pairs of each kind."""
    found = {}
    for kind, drawn in pairs.items():
        batch = batch_of([(pair.question, [pair.chosen, pair.rejected]) for pair in drawn], encoder)
        scores_BA = model.scores(batch, model.hidden(batch))
        found[kind] = float((scores_BA[:, 0] > scores_BA[:, 1]).float().mean())
    return found


@torch.no_grad()
def written(model: PlainModel, encoder: Encoder, pairs: Mapping[str, Sequence[LessonPair]]) -> dict[str, float]:
    """The share of right answers of each kind, of those that the language model writes greedily."""
    found = {}
    for kind, drawn in pairs.items():
        right = 0
        for pair in drawn:
            ids = encoder.prompt(pair.question)
            start = len(ids)
            while len(ids) < start + 30:
                rows = (ids, [*range(len(ids))], [-1] * len(ids), [len(ids) - 1], [-100] * len(ids))
                batch = Batch(*(torch.tensor([row]) for row in rows))
                logits = F.linear(model.hidden(batch)[0, -1], model._weight("model.tok_embeddings.weight"))
                ids.append(int(logits.argmax()))
                if ids[-1] == encoder.end:
                    break
            right += pair.question.accepts(encoder._tokenizer.decode(ids[start:]))
        found[kind] = right / len(drawn)
    return found


def optimizer(model: PlainModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; vectors and embeddings are not decayed."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embeddings" in name]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def train(config: TrainConfig) -> PlainModel:
    """Train for the minutes of `config`, and log what is right."""
    tokenizer = tiny.tokenizer()
    encoder, teacher = Encoder(tokenizer), Teacher(config.num_wrong)
    model = PlainModel.fresh(tokenizer.get_vocab_size()) if config.start is None else load(config.start)
    steps = optimizer(model, config.learning_rate)
    held_out = {kind: lessons.pairs(kind, 60, seed=1) for kind in KINDS}
    began = logged = time.monotonic()
    progress = Progress()
    for groups in _batches(teacher, encoder, config.num_groups):
        progress.elapsed_s = time.monotonic() - began
        if progress.elapsed_s > 60 * config.minutes:
            break
        for group in steps.param_groups:
            group["lr"] = _learning_rate(config, progress)
        batch = batch_of(groups, encoder)
        scores_BA, preference, language = model.losses(batch)
        loss = preference + config.language_weight * language + CENTRED * scores_BA.square().mean()
        steps.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        teacher.learn(groups, scores_BA.detach())
        progress.count(batch.ids_BT.numel(), float(preference.detach()), float(language.detach()))
        if time.monotonic() - logged > EVALUATED_EVERY_S:
            logged = time.monotonic()
            _report(config, model, encoder, held_out, progress)
    _report(config, model, encoder, held_out, progress)
    return model


@dataclass(slots=True)
class Progress:
    """How far a training is; the losses are running means."""

    elapsed_s: float = 0.0
    step: int = 0
    tokens: int = 0
    preference_loss: float = 0.0
    language_loss: float = 0.0

    def count(self, tokens: int, preference: float, language: float) -> None:
        """Note a step."""
        share = max(0.02, 1 / (self.step + 1))
        self.step += 1
        self.tokens += tokens
        self.preference_loss += share * (preference - self.preference_loss)
        self.language_loss += share * (language - self.language_loss)


def _learning_rate(config: TrainConfig, progress: Progress) -> float:
    """A short rise, then half a cosine over the time."""
    half_cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress.elapsed_s / (60 * config.minutes))))
    return config.learning_rate * min(1.0, (progress.step + 1) / 200) * (0.02 + 0.98 * half_cosine)


def _batches(teacher: Teacher, encoder: Encoder, num_groups: int) -> Iterator[list[tuple[Question, list[str]]]]:
    """Batches without end: several are drawn at once and cut by length, so that little is padding."""
    order = random.Random(SEED)
    while True:
        groups = sorted(teacher.groups(8 * num_groups), key=lambda group: _length(group, encoder))
        batches = [groups[at : at + num_groups] for at in range(0, len(groups), num_groups)]
        order.shuffle(batches)
        yield from batches


def _length(group: tuple[Question, Sequence[str]], encoder: Encoder) -> int:
    return len(encoder.prompt(group[0])) + sum(len(encoder.answer(answer)) for answer in group[1])


def _report(
    config: TrainConfig,
    model: PlainModel,
    encoder: Encoder,
    pairs: Mapping[str, Sequence[LessonPair]],
    progress: Progress,
) -> None:
    """Save the weights as they are and print the accuracy of each kind."""
    found = accuracy(model, encoder, pairs)
    save(model, config.output)
    mean = sum(found.values()) / len(found)
    if config.log is not None:
        with config.log.open("a", encoding="utf-8") as file:
            print(json.dumps(asdict(progress) | {"mean": mean, "accuracy": found}), file=file)
    shares = ", ".join(f"{kind} {share:.2f}" for kind, share in found.items())
    losses = f"losses {progress.preference_loss:.3f} {progress.language_loss:.3f}"
    print(f"{progress.elapsed_s:.0f} s, step {progress.step}, {losses}; right {mean:.3f}: {shares}", flush=True)


def save(model: PlainModel, path: Path) -> None:
    """Write the weights with the hash of their vocabulary."""
    save_file(model.weights(), path, metadata={"format": "pt", "vocabulary": tiny.vocabulary_hash(tiny.tokenizer())})


def load(path: Path) -> PlainModel:
    """The weights of a file in the plain model."""
    return PlainModel(load_file(path))


def main() -> None:
    """Run the command line."""
    config = tyro.cli(TrainConfig, description=__doc__, prog="python -m tests.benchmarks.train_tiny")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = train(config)
    shares = written(model, Encoder(tiny.tokenizer()), {kind: lessons.pairs(kind, 25, seed=2) for kind in KINDS})
    print("written greedily:", " ".join(f"{kind} {share:.2f}" for kind, share in shares.items()))


if __name__ == "__main__":
    main()
