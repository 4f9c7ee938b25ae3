"""Check a downloaded reward model against the figures of its model card.

    python -m jobs.verify --model internlm/internlm2-1_8b-reward

The card of InternLM2-1.8B-Reward gives the scores of two chats in float16 on a GPU. In float16 on CUDA ours must agree
within 0.02, in other dtypes within 0.15. Exit status: 0 all agree, 4 something does not, 1 the model cannot be
loaded, 2 an option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.verify")

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from jobs.command import parse, run_command

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

__all__ = ["Check", "VerifyConfig", "checks", "main", "verify"]

QUESTION = {"role": "user", "content": "Hello! What's your name?"}
CHATS = [
    [
        QUESTION,
        {"role": "assistant", "content": "My name is InternLM2! A helpful AI assistant. What can I do for you?"},
    ],
    [QUESTION, {"role": "assistant", "content": "I have no idea."}],
]
# "Demo Code, Basic Usage" of the model card of internlm/internlm2-1_8b-reward.
CARD_SCORES = (0.767578125, -2.22265625)
TOLERANCE_FP16_CUDA, TOLERANCE_OTHER = 0.02, 0.15
EXIT_MISMATCH = 4


class VerifyConfig(BaseModel):
    """Check InternLM2-1.8B-Reward against the figures of its model card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "internlm/internlm2-1_8b-reward"
    """A folder or Hugging Face id with the files of InternLM2-1.8B-Reward."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float16 on cuda; on cpu bfloat16 where the processor has it, else float32."""


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of the card, ours, and whether they agree."""

    name: str
    card: str
    ours: str
    agrees: bool


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.verify") -> int:
    """Run the command line; the exit status."""
    config = parse(VerifyConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: verify(config), log_level=logging.WARNING)


def verify(config: VerifyConfig) -> int:
    """Print the table of checks; the exit status."""
    from serve_app.reward_model import RewardModel  # brings torch

    model = RewardModel.from_pretrained(
        config.model, revision=config.revision, device=config.device, dtype=config.dtype
    )
    results = checks(model)
    print(f"{config.model} in {str(model.dtype).removeprefix('torch.')} on {model.device}")
    print(f"{'check':<12}{'card':>14}{'rayward':>14}")
    for check in results:
        print(f"{check.name:<12}{check.card:>14}{check.ours:>14}  {'ok' if check.agrees else 'MISMATCH'}")
    return 0 if all(check.agrees for check in results) else EXIT_MISMATCH


def checks(model: RewardModel) -> list[Check]:
    """Score the card's two chats, compare and rank them, and hold each result against the card's."""
    import torch

    fp16_on_cuda = model.device.type == "cuda" and model.dtype == torch.float16
    tolerance = TOLERANCE_FP16_CUDA if fp16_on_cuda else TOLERANCE_OTHER
    results = [
        Check(f"score_{number}", f"{card:.6f}", f"{ours:.6f}", abs(ours - card) <= tolerance)
        for number, (card, ours) in enumerate(zip(CARD_SCORES, model.get_scores(CHATS), strict=True), start=1)
    ]
    better, ranks = model.compare(*CHATS), model.rank(CHATS)
    results.append(Check("compare", "True", str(better), better is True))
    results.append(Check("rank", "[0, 1]", str(ranks), ranks == [0, 1]))
    return results
