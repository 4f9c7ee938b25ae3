"""Scores that authors publish for given chats, as data: `jobs.verify` holds a checkpoint against those of its model.

Several models may have one shape, as the many that were trained from Llama-3.1-8B; each is a candidate then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.reward_model import Conversation, Message
from serve_app.reward_model.architecture import DecoderConfig

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Shape:
    """The traits of a checkpoint that tell which models it may be; its name is none of them."""

    architecture: str
    hidden_size: int
    num_layers: int
    takes_reference: bool = False

    @classmethod
    def of(cls, config: DecoderConfig, *, takes_reference: bool) -> Shape:
        """The shape of a checkpoint's configuration; POLAR's tokenizer tells it from InternLM2-Reward."""
        return cls(config.architecture, config.hidden_size, config.num_layers, takes_reference)


@dataclass(frozen=True, slots=True)
class Published:
    """The published `scores` of `conversations`, the better one first, and how they were computed.

    `tolerance` is how far ours may be from them on a GPU in the `dtype` of the source, `tolerance_other` in any other
    way.
    """

    model: str
    shape: Shape
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


# InternLM's page of the whole series (model_cards/internlm2_reward.md) prints the same two figures under the name of
# the 20B, so the 7B and the 20B have none of their own.
INTERNLM2_1_8B = Published(
    model="internlm/internlm2-1_8b-reward",
    shape=Shape("InternLM2ForRewardModel", 2048, 24),
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
    shape=Shape("InternLM2ForRewardModel", 4096, 32, takes_reference=True),
    source="README of github.com/InternLM/POLAR, Inference with transformers",
    conversations=_answers("What is the capital of China?", "Beijing.", "Shanghai.", reference="Beijing."),
    scores=(-0.5702977776527405, -11.030370712280273),
    dtype="float32",
    tolerance=0.02,
    tolerance_other=0.15,
)

# The example of every card of Skywork. SGLang's scores of it are up to 0.125 from Transformers' in bfloat16, whose step
# is 0.125 at 23: so much tells other kernels, and no fault.
APPLES = _answers(
    "Jane has 12 apples. She gives 4 apples to her friend Mark, then buys 1 more apple, and finally splits all her "
    "apples equally among herself and her 2 siblings. How many apples does each person get?",
    "1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among herself and her 2 siblings (3 people in total). "
    "9 ÷ 3 = 3 apples each. Each person gets 3 apples.",
    "1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among her 2 siblings (2 people in total). "
    "9 ÷ 2 = 4.5 apples each. Each person gets 4 apples.",
)
LLAMA_8B = Shape("LlamaForSequenceClassification", 4096, 32)


def _skywork(model: str, shape: Shape, source: str, *scores: float) -> Published:
    return Published(model, shape, source, APPLES, scores, dtype="bfloat16", tolerance=0.2, tolerance_other=0.4)


SKYWORK_V2_QWEN3_0_6B = _skywork(
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    Shape("Qwen3ForSequenceClassification", 1024, 28),
    "github.com/sgl-project/sglang, pull request 17992: Transformers on the pair of the model card",
    7.875,
    0.9453125,
)
SKYWORK_V2_LLAMA_8B = _skywork(
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B", LLAMA_8B, "its model card, Simple Example in transformers", 23.0, 3.59375
)
SKYWORK_LLAMA_8B_V02 = _skywork(
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", LLAMA_8B, "its model card, Demo Code, 8B", 13.6875, -9.1875
)
SKYWORK_LLAMA_8B = _skywork(
    "Skywork/Skywork-Reward-Llama-3.1-8B", LLAMA_8B, "its model card, Demo Code", 12.625, -15.25
)
PUBLISHED = (
    INTERNLM2_1_8B,
    POLAR_7B,
    SKYWORK_V2_QWEN3_0_6B,
    SKYWORK_V2_LLAMA_8B,
    SKYWORK_LLAMA_8B_V02,
    SKYWORK_LLAMA_8B,
)


def published_for(shape: Shape) -> tuple[Published, ...]:
    """The published figures of the models that have this shape; none where nothing is published."""
    return tuple(figures for figures in PUBLISHED if figures.shape == shape)
