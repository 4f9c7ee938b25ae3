"""How RewardBench's own scripts shorten a conversation before they score it, as `--leaderboard` does.

Read in github.com/allenai/reward-bench at commit 05a9005. `scripts/run_rm.py` (RewardBench) and `scripts/run_v2.py`
(RewardBench 2) cut at `--max_length`, 2,048 tokens by default. The first sets `tokenizer.truncation_side = "left"` for
every classifier; the second leaves the tokenizer's own side, which is right. `rewardbench/models/internlm.py`, which
scores InternLM2-Reward in both, cuts nothing.

Cut from the left here, a response that alone exceeds the limit has no score, where theirs would lose its beginning; and
a BOS that the template writes stays, where theirs is lost unless the tokenizer adds one.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.benchmarks.dataset import Benchmark
from serve_app.reward_model.families import INTERNLM2
from serve_app.reward_model.tokenizer import Truncation

MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LeaderboardCut:
    """What is done with a conversation over `max_tokens`, None for the model's own limit, and the script that does."""

    truncation: Truncation
    max_tokens: int | None
    source: str

    def __str__(self) -> str:
        if self.max_tokens is None:
            return f"leaderboard settings: nothing is cut, as in {self.source}"
        kept = {"left": "end", "right": "start"}[self.truncation]
        return f"leaderboard settings: the {kept} of {self.max_tokens:,} tokens is kept, as in {self.source}"


def leaderboard_cut(benchmark: Benchmark, architecture: str) -> LeaderboardCut:
    """The cut that RewardBench's own script for `benchmark` makes for a model of this architecture."""
    if architecture == INTERNLM2:
        return LeaderboardCut("error", None, "rewardbench/models/internlm.py")
    if benchmark is Benchmark.REWARDBENCH:
        return LeaderboardCut("left", MAX_TOKENS, "scripts/run_rm.py")
    return LeaderboardCut("right", MAX_TOKENS, "scripts/run_v2.py")
