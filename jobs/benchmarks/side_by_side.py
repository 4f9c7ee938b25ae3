"""Scores of Transformers' own class beside ours: the same checkpoint, chats, dtype and device. For `jobs.verify`.

Transformers' side is computed from its own parts alone: `AutoTokenizer` renders and encodes the chats,
`AutoModelForSequenceClassification` scores them one by one, and the place where it reads is seen from outside, as the
token whose logit it returns. No code from a model's repository is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import ComparisonError
from serve_app.reward_model import Conversation, Message

if TYPE_CHECKING:
    import torch

    from serve_app.reward_model import RewardModel
    from serve_app.reward_model.architecture import DecoderConfig


def _chat(*texts: str) -> Conversation:
    return Conversation(tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)))


# No system message: some templates refuse one.
CHATS: dict[str, Conversation] = {
    "English": _chat("What is the capital of France?", "Paris."),
    "English, wrong": _chat("What is the capital of France?", "I would rather not say."),
    "Chinese": _chat("请用一句话解释什么是光合作用。", "植物利用阳光,把二氧化碳和水变成糖和氧气。"),
    "code": _chat(
        "Write a Python function that adds two numbers.", "```python\ndef add(a, b):\n    return a + b\n```\n"
    ),
    "three turns": _chat(
        "Hello! I plan a trip to Rome.",
        "How nice! When do you go?",
        "In May, for three days. What should I see?",
        "The Forum and the Colosseum on the first day, the Vatican on the second, and Trastevere on the third.",
    ),
    "Chinese, three turns": _chat(
        "你好,我想学做番茄炒蛋。",
        "好的,先准备两个番茄和三个鸡蛋。",
        "然后呢?",
        "先炒蛋盛出,再炒番茄,最后一起加盐翻匀。",
    ),
}
"""Short chats of several kinds, by name."""

TOLERANCES = {"float32": (1e-3, 1e-3), "float16": (0.02, 0.005), "bfloat16": (0.15, 0.02)}
"""By dtype, how far two scores may be apart: absolute, and as a share of the score. Both add up."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One side's reading of a chat: the token ids, the 0-based place where the score is read, and the score."""

    token_ids: tuple[int, ...]
    place: int
    score: float

    def agrees(self, other: Reading, *, dtype: str) -> bool:
        """Whether both sides read the same ids at the same place, and their scores are equal but for rounding."""
        absolute, relative = TOLERANCES[dtype]
        near = abs(self.score - other.score) <= absolute + relative * abs(other.score)
        return near and (self.token_ids, self.place) == (other.token_ids, other.place)


def check_class(architecture: str) -> None:
    """Refuse an architecture that Transformers does not ship.

    Raises:
        ComparisonError: it is one.
    """
    import transformers

    if not architecture.endswith("ForSequenceClassification") or not hasattr(transformers, architecture):
        raise ComparisonError(
            f"Transformers {transformers.__version__} ships no class that scores {architecture}, and code from a "
            "model's repository is never run; leave --against out where the model's authors publish figures"
        )


def our_readings(model: RewardModel) -> dict[str, Reading]:
    """Our reading of each of `CHATS`."""
    ids = {name: tuple(model.tokenizer.encode(chat)) for name, chat in CHATS.items()}
    scores = model.score_token_ids([list(sequence) for sequence in ids.values()])
    return {
        name: Reading(sequence, model.config.num_read(sequence) - 1, float(score))
        for (name, sequence), score in zip(ids.items(), scores, strict=True)
    }


def room_warning(folder: Path, device: torch.device) -> str | None:
    """A sentence where Transformers' copy of the weights may not fit into the memory that is free; None where it does.

    Weights are counted as the files have them. Our own model is to be gone by then.
    """
    needed = sum(file.stat().st_size for file in _weight_files(folder))
    free = _free_bytes(device)
    if free is None or needed < free:
        return None
    return (
        f"Transformers' model takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}: it may "
        "not fit"
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _free_bytes(device: torch.device) -> int | None:
    """The memory that a process may still take; None where this system does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def transformers_readings(
    folder: Path, config: DecoderConfig, *, device: torch.device, dtype: torch.dtype, chat_template: str | None = None
) -> dict[str, Reading]:
    """The reading of each of `CHATS` by Transformers' own class.

    Args:
        folder: the checkpoint's.
        config: its shape, which names the class.
        device: where it is scored.
        dtype: of its weights.
        chat_template: a template in place of the checkpoint's.

    Raises:
        ComparisonError: Transformers cannot load it, makes another class of it, or there is too little memory.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False, dtype=dtype)
        model = model.to(device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ComparisonError(f"Transformers' model does not fit the memory of {device}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ComparisonError(f"Transformers cannot load {folder}: {error}") from error
    if type(model).__name__ != config.architecture:
        raise ComparisonError(
            f"Transformers makes a {type(model).__name__} of {folder}, which is {config.architecture}"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return {name: _reading(model, _ids(tokenizer, chat), device) for name, chat in CHATS.items()}


def _ids(tokenizer: Any, chat: Conversation) -> list[int]:
    """Token ids as RewardBench's pipeline has them: the rendered text with special tokens, a doubled BOS dropped."""
    from serve_app.reward_model.tokenizer import DATE

    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    ids: list[int] = tokenizer(text)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _reading(model: Any, ids: Sequence[int], device: torch.device) -> Reading:
    import torch

    seen: list[torch.Tensor] = []
    hook = model.score.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.inference_mode():
            score = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, 0]
    finally:
        hook.remove()
    places = (seen[0].reshape(-1) == score).nonzero().reshape(-1).tolist()
    return Reading(tuple(ids), places[-1] if places else -1, float(score))
