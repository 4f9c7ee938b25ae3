"""Scores that authors publish for given chats, as data: `jobs.verify` holds a checkpoint against those of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.reward_model import Conversation, Message

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Published:
    """The published `scores` of `conversations`, the better one first, and how they were computed.

    `tolerance` is how far ours may be from them on the device and in the `dtype` of the source, `tolerance_other` in
    any other way.
    """

    model: str
    source: str
    conversations: tuple[Conversation, ...]
    scores: tuple[float, ...]
    dtype: str
    tolerance: float
    tolerance_other: float

    def allowed(self, model: RewardModel) -> float:
        """How far the scores of `model` may be from these."""
        dtype = str(model.dtype).removeprefix("torch.")
        return self.tolerance if (model.device.type, dtype) == ("cuda", self.dtype) else self.tolerance_other


def _answers(question: str, *answers: str, reference: str | None = None) -> tuple[Conversation, ...]:
    asked = Message("user", question)
    return tuple(Conversation((asked, Message("assistant", answer)), reference) for answer in answers)


INTERNLM2_1_8B = Published(
    model="internlm/internlm2-1_8b-reward",
    source="its model card, Demo Code, Basic Usage",
    conversations=_answers(
        "Hello! What's your name?",
        "My name is InternLM2! A helpful AI assistant. What can I do for you?",
        "I have no idea.",
    ),
    scores=(0.767578125, -2.22265625),
    dtype="float16",
    tolerance=0.02,
    tolerance_other=0.15,
)
# The source names no dtype. The digits printed are float32's, which its way of loading the model gives by default.
POLAR_7B = Published(
    model="internlm/POLAR-7B",
    source="README of github.com/InternLM/POLAR, Inference with transformers",
    conversations=_answers("What is the capital of China?", "Beijing.", "Shanghai.", reference="Beijing."),
    scores=(-0.5702977776527405, -11.030370712280273),
    dtype="float32",
    tolerance=0.02,
    tolerance_other=0.15,
)
POLAR_7B_HIDDEN_SIZE = 4096


def published_for(model: RewardModel) -> Published | None:
    """The figures to hold a model against, which is told by its checkpoint and not by its name; None for POLAR's other
    sizes, which have none.
    """
    if not model.tokenizer.takes_reference:
        return INTERNLM2_1_8B
    return POLAR_7B if model.config.hidden_size == POLAR_7B_HIDDEN_SIZE else None
