"""PPO's formulas against plain ones, and what its actors read. Training itself: `test_demo.py`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cluster.rlhf.ppo import (
    PolicyActor,
    PpoOptions,
    advantages_and_returns,
    masked_mean,
    policy_loss,
    value_loss,
    whitened,
)
from cluster.rlhf.tiny_policy import (
    PROMPTS,
    QUESTIONS,
    generate,
    random_policy,
    share_right,
    taught_policy,
    taught_values,
)
from serve_app.reward_model import RewardModel
from serve_app.reward_model.tiny import cached_folder

END = 4
"""The id of `<|im_end|>`: the policy's EOS and padding."""
MASK_BR = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_advantages_are_the_discounted_sum_of_errors_and_stop_at_the_end() -> None:
    torch.manual_seed(0)
    rewards_BR, values_BR = torch.randn(2, 5) * MASK_BR, torch.randn(2, 5)
    advantages_BR, returns_BR = advantages_and_returns(rewards_BR, values_BR, MASK_BR, discount=0.9, trace=0.8)
    for row, length in enumerate((5, 3)):
        values = [*values_BR[row, :length].tolist(), 0.0]
        errors = [float(rewards_BR[row, at]) + 0.9 * values[at + 1] - values[at] for at in range(length)]
        for at in range(length):
            expected = sum((0.9 * 0.8) ** (later - at) * errors[later] for later in range(at, length))
            assert float(advantages_BR[row, at]) == pytest.approx(expected, abs=1e-5)
            assert float(returns_BR[row, at]) == pytest.approx(expected + values[at], abs=1e-5)
    assert not advantages_BR[1, 3:].any()
    assert not returns_BR[1, 3:].any()


def test_with_trace_one_returns_are_the_rewards_to_come() -> None:
    rewards_BR = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0], [0.0, 0.0, -1.0, 0.0, 0.0]])
    _, returns_BR = advantages_and_returns(rewards_BR, torch.rand(2, 5), MASK_BR, discount=1.0, trace=1.0)
    assert torch.allclose(returns_BR, torch.tensor([[2.0] * 5, [-1.0, -1.0, -1.0, 0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "moves"), [(1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False)]
)
def test_the_policy_gains_nothing_beyond_the_clip(advantage: float, log_ratio: float, moves: bool) -> None:
    logprobs = torch.full((1, 1), log_ratio, requires_grad=True)
    ones = torch.ones(1, 1)
    policy_loss(logprobs, torch.zeros(1, 1), advantage * ones, ones, clip_range=0.2).backward()
    assert bool(logprobs.grad) is moves


def test_losses_leave_out_what_does_not_count() -> None:
    wild_BR = torch.where(MASK_BR.bool(), 0.5, 1e6)
    assert float(masked_mean(wild_BR, MASK_BR)) == 0.5
    zeros_BR = torch.zeros(2, 5)
    assert float(value_loss(wild_BR, zeros_BR, zeros_BR, MASK_BR, clip_range=10.0)) == pytest.approx(0.125)
    assert float(value_loss(wild_BR, zeros_BR, wild_BR, MASK_BR, clip_range=0.2)) == pytest.approx(0.045)  # held near
    spread_BR = whitened(torch.randn(2, 5), MASK_BR)
    assert float(masked_mean(spread_BR, MASK_BR)) == pytest.approx(0.0, abs=1e-6)
    assert float(masked_mean(spread_BR**2, MASK_BR)) == pytest.approx(1.0, abs=1e-4)
    assert not spread_BR[1, 3:].any()


def test_padding_and_an_end_of_the_same_id_are_told_apart_and_change_nothing(tiny: RewardModel, threads: None) -> None:
    torch.set_num_threads(1)
    policy = random_policy(0)
    policy.lm_head.weight.data[END] *= 20  # ends are likely, and at different lengths
    rollout = generate(policy, ["Hi", "What do you know about time?"] * 8, max_new_tokens=8)
    responses_BR = rollout.sequences_BT[:, rollout.num_prompt_tokens :]
    ended = [row for row, text in enumerate(rollout.response_texts()) if text.endswith("<|im_end|>")]
    assert ended
    for row in ended:
        assert responses_BR[row][rollout.response_mask_BR[row].bool()].tolist().count(END) == 1
    assert rollout.mask_BT[0].sum() < rollout.mask_BT[1].sum()
    actor = PolicyActor(0, PpoOptions())
    together = actor.logprobs(rollout)
    alone = actor.logprobs(rollout.rows(torch.tensor([0])))
    assert torch.allclose(together[0], alone[0], atol=1e-5)


def test_policies_of_one_seed_are_alike_and_values_begin_at_zero(tiny: RewardModel) -> None:
    first, second, other = random_policy(3), random_policy(3), random_policy(4)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not taught_values().score.weight.any()


def test_the_taught_policy_is_the_trunk_of_the_embedded_model(tiny: RewardModel) -> None:
    """Its hidden state at the reward token, times the reward model's head, is the reward model's score."""
    chat = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "It is 7."}]
    ids = tiny.tokenizer.encode(chat)
    with torch.no_grad():
        hidden_1TH = taught_policy().model(torch.tensor([ids])).last_hidden_state
    head = load_file(cached_folder() / "model.safetensors")["v_head.weight"].float()
    assert float(head @ hidden_1TH[0, -1]) == pytest.approx(tiny.get_score(chat), abs=1e-4)


def test_the_rule_counts_right_answers_and_not_the_marker_of_the_end() -> None:
    right = QUESTIONS[PROMPTS[0]].right[0]
    assert share_right(PROMPTS[:1] * 4, [right, f"{right}<|im_end|>", "no", f"<|im_end|>{right}"]) == 0.5
