"""Check a downloaded reward model against the figures that its authors publish.

    python -m jobs.verify --model internlm/internlm2-1_8b-reward

The card of InternLM2-1.8B-Reward gives the scores of two chats in float16 on a GPU, the README of POLAR those of two
chats for POLAR-7B. On CUDA in the dtype of the source ours must agree within 0.02, elsewhere within 0.15. Exit status:
0 all agree, 4 something does not, 1 the model cannot be loaded, 2 an option is wrong, 130 or 143 it was interrupted.
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

from jobs.benchmarks.published import INTERNLM2_1_8B, POLAR_7B, Published, published_for
from jobs.command import parse, run_command
from jobs.errors import UnpublishedModelError

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

EXIT_MISMATCH = 4


class VerifyConfig(BaseModel):
    """Check InternLM2-1.8B-Reward or POLAR-7B against the figures that their authors publish."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "internlm/internlm2-1_8b-reward"
    """A folder or Hugging Face id with the files of InternLM2-1.8B-Reward or POLAR-7B."""
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
    figures = published_for(model)
    if figures is None:
        raise UnpublishedModelError(
            f"{config.model} is a POLAR model of a size for which no figures are published; {POLAR_7B.model} has some"
        )
    results = checks(model, figures)
    print(f"{figures.model}: {figures.source}")
    print(f"{config.model} in {str(model.dtype).removeprefix('torch.')} on {model.device}")
    print(f"{'check':<12}{'card':>14}{'rayward':>14}")
    for check in results:
        print(f"{check.name:<12}{check.card:>14}{check.ours:>14}  {'ok' if check.agrees else 'MISMATCH'}")
    return 0 if all(check.agrees for check in results) else EXIT_MISMATCH


def checks(model: RewardModel, figures: Published = INTERNLM2_1_8B) -> list[Check]:
    """Score the published chats, compare and rank them, and hold each result against the published one."""
    tolerance = figures.allowed(model)
    pairs = zip(figures.scores, model.get_scores(figures.conversations), strict=True)
    results = [
        Check(f"score_{number}", f"{card:.6f}", f"{ours:.6f}", abs(ours - card) <= tolerance)
        for number, (card, ours) in enumerate(pairs, start=1)
    ]
    better, ranks = model.compare(*figures.conversations), model.rank(figures.conversations)
    results.append(Check("compare", "True", str(better), better is True))
    results.append(Check("rank", "[0, 1]", str(ranks), ranks == [0, 1]))
    return results
