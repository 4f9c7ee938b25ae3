"""ms-swift: rewards for `swift rlhf --rlhf_type grpo`. Read and run: ms-swift 4.6.0.

In a file of your own, named by `--external_plugins` on every node, with `--reward_funcs rayward`:

    from cluster.rlhf.ms_swift import register

    register("rayward", source="http://127.0.0.1:8000")

ms-swift makes `orms[name](args=args)` and calls it with `completions` (text) and the rows' columns; `messages` is the
whole conversation, the completion last. None becomes NaN. Asynchronous rewards run in a new event loop at each step.
ms-swift puts the plugin's folder first on the module path: this folder, whose `trl.py` would stand for TRL, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import FrameworkError, framework_module
from cluster.rlhf.rollouts import Read, Rewards, RolloutScorer
from cluster.rlhf.sources import OnError

if __name__.startswith("_swift_external_"):
    raise FrameworkError(
        "name a plugin file of your own by --external_plugins, outside rayward's folder, that calls "
        "cluster.rlhf.ms_swift.register"
    )


def register(
    name: str = "rayward",
    *,
    source: Any = None,
    policy_tokenizer: Any = None,
    strip_thinking: bool = False,
    on_error: OnError = "raise",
    reference_column: str | None = None,
    asynchronous: bool = True,
) -> type[Any]:
    """Make a reward known to ms-swift as `--reward_funcs NAME`; returns its class.

    Args:
        source, policy_tokenizer, strip_thinking, on_error, reference_column: see `RolloutScorer`.
        asynchronous: whether other asynchronous rewards are computed meanwhile.

    Raises:
        FrameworkError: ms-swift is not installed, or has another reward of that name.
    """
    swift = framework_module("swift.rewards.orm", install="pip install ms-swift")
    if name in swift.orms:
        raise FrameworkError(f"ms-swift has a reward named {name!r} already; choose another name")
    scorer = RolloutScorer(
        source,
        policy_tokenizer=policy_tokenizer,
        strip_thinking=strip_thinking,
        on_error=on_error,
        reference_column=reference_column,
    )

    class RaywardORM(swift.ORM):  # type: ignore[misc,name-defined]  # ms-swift has no types
        def __call__(self, completions: Sequence[str], **columns: Any) -> Rewards:
            return scorer.rewards_of(_read(scorer, completions, columns))

    class AsyncRaywardORM(swift.AsyncORM):  # type: ignore[misc,name-defined]
        async def __call__(self, completions: Sequence[str], **columns: Any) -> Rewards:
            return await scorer.rewards_of_async(_read(scorer, completions, columns))

    made: type[Any] = AsyncRaywardORM if asynchronous else RaywardORM
    swift.orms[name] = made
    return made


def _read(scorer: RolloutScorer, completions: Sequence[str], columns: Mapping[str, Any]) -> list[Read]:
    """A conversation per completion: its messages but the last, which is the completion as the template knows it."""
    logs = columns.get("messages")
    if logs is None or len(logs) != len(completions):
        found = "no" if logs is None else str(len(logs))
        raise RewardInputError(f"there are {found} lists of messages for {len(completions)} completions")
    read = scorer.read_each(
        len(completions), lambda place: scorer.reader.conversation(logs[place][:-1], completions[place])
    )
    return scorer.with_references(read, columns)
