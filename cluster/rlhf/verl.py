"""verl: a reward manager over any source of rewards, and `compute_score`. Read and run: verl 0.9.1.

    reward.reward_manager.source=importlib reward.reward_manager.name=RaywardRewardManager
    reward.reward_manager.module.path=pkg://cluster.rlhf.verl
    +reward.reward_kwargs.rayward.url=http://127.0.0.1:8000

verl makes the manager in each `RewardLoopWorker` as `cls(config=, tokenizer=, compute_score=, **more)` and awaits
`run_single(data) -> {"reward_score", "reward_extra_info"}` for one sample at a time, many at once; the batch's last row
is the sample. Where rows come from the agent loop, prompts are padded on the right and the attention mask does not
line up with them: then `prompt_len` and `response_len` count, else the mask. `reward_extra_info` must be there, with
the same keys for every sample. A custom reward function sees the response alone, so the manager is the better way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from cluster.reward_pool.errors import RewardInputError
from cluster.rlhf.errors import framework_module
from cluster.rlhf.rollouts import RolloutScorer, SourceSettings

__all__ = ["RaywardRewardManager", "compute_score", "sample_conversation", "settings_of"]  # noqa: F822  # see below

PROMPT_KEYS = ("prompt", "question", "raw_prompt")


def settings_of(config: Any) -> SourceSettings:
    """`reward.reward_kwargs.rayward` in verl's configuration. Raises RewardInputError where an entry is wrong."""
    given = (config.reward.get("reward_kwargs") or {}).get("rayward") or {}
    return SourceSettings.of(given, where="reward.reward_kwargs.rayward")


def __getattr__(name: str) -> Any:
    """`RaywardRewardManager`, made where verl asks for it: its base is verl's."""
    if name == "RaywardRewardManager":
        return _manager_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@lru_cache(maxsize=1)
def _manager_class() -> type[Any]:
    base = framework_module("verl.experimental.reward_loop.reward_manager.base", install="pip install verl")

    class RaywardRewardManager(base.RewardManagerBase):  # type: ignore[misc,name-defined]  # verl has no types
        """Rewards of verl's samples: raw logits."""

        def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **router: Any) -> None:
            super().__init__(config, tokenizer, compute_score)
            self._scorer = settings_of(config).scorer(tokenizer)

        async def run_single(self, data: Any) -> dict[str, Any]:
            """The reward of the last row of `data`."""
            sample = data[-1:][0]
            conversation = await asyncio.to_thread(sample_conversation, sample, self._scorer)
            columns = {name: [value] for name, value in sample.non_tensor_batch.items()}
            read = self._scorer.with_references([conversation], columns)
            (reward,) = await self._scorer.all_rewards_of_async(read)
            return {"reward_score": reward, "reward_extra_info": {"rayward_score": reward}}

    return RaywardRewardManager


def sample_conversation(sample: Any, scorer: RolloutScorer) -> list[dict[str, str]]:
    """The conversation of one row of a DataProto: its `raw_prompt` and response, or all turns of several.

    Raises:
        RewardInputError: the row has no `raw_prompt`; `data.return_raw_chat=True` keeps it.
        ConversationError: it has a part that is no text, or turns that cannot be read.
    """
    prompt_ids, response_ids = _token_ids(sample)
    columns = sample.non_tensor_batch
    if int(columns.get("__num_turns__") or 0) > 2:  # tools or users spoke between the policy's answers
        return scorer.reader.read_ids([*prompt_ids, *response_ids])
    if "raw_prompt" not in columns:
        raise RewardInputError("the batch has no raw_prompt; set data.return_raw_chat=True")
    tokenizer = scorer.reader.policy_tokenizer
    return scorer.reader.conversation(list(columns["raw_prompt"]), _text(tokenizer, response_ids))


def _token_ids(sample: Any) -> tuple[list[int], list[int]]:
    """Prompt and response of a row without padding."""
    prompts_P, responses_R, mask_T = (sample.batch[name] for name in ("prompts", "responses", "attention_mask"))
    lengths = [sample.non_tensor_batch.get(name) for name in ("prompt_len", "response_len")]
    if None not in lengths:
        return prompts_P[: int(lengths[0])].tolist(), responses_R[: int(lengths[1])].tolist()
    num_prompt = len(prompts_P)
    return prompts_P[mask_T[:num_prompt].bool()].tolist(), responses_R[mask_T[num_prompt:].bool()].tolist()


def _text(tokenizer: Any, response_ids: Sequence[int]) -> str:
    """A response's text; the EOS and padding behind it are ids, whatever they are spelled like."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    last = next((place for place, token in enumerate(reversed(response_ids)) if token not in ends), len(response_ids))
    text: str = tokenizer.decode(response_ids[: len(response_ids) - last], skip_special_tokens=False)
    return text


_scorer = lru_cache(maxsize=1)(RolloutScorer)


async def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A custom reward function: `reward.custom_reward_function.path=pkg://cluster.rlhf.verl`.

    verl gives it no prompt: the dataset's `extra_info` has to hold it as `prompt`, `question` or `raw_prompt`. The
    source is what the environment names.

    Raises:
        RewardInputError: `extra_info` holds no prompt.
    """
    prompt = next((extra_info[key] for key in PROMPT_KEYS if extra_info and extra_info.get(key) is not None), None)
    if prompt is None:
        raise RewardInputError(
            f"verl gives a custom reward function no prompt: put one into extra_info as one of {list(PROMPT_KEYS)}, or "
            "use RaywardRewardManager"
        )
    turns = prompt if isinstance(prompt, str) else list(prompt)
    (reward,) = await _scorer().rewards_async([turns], [solution_str])
    return {"score": reward}
