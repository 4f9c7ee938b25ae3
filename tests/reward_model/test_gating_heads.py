"""Gating heads: the score is the formula of their authors' papers, the attributes what their code gives beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.reward_model import RewardModel, TokenIdsError, WeightError
from serve_app.reward_model.families import GATE_PATTERN, attribute_names
from tests.reward_model.tiny_checkpoints import HIDDEN, SEQUENCES, body, drawn, hidden_states, last_states, load, write

COUNT, QUANTILES, GATE_WIDTH, TEMPERATURE = 19, 3, 24, 4.0
OPTIONS: dict[str, Any] = {"vocab_size": max(GATE_PATTERN) + 1, "hidden_size": 32, "num_hidden_layers": 2}
WIDTH = OPTIONS["hidden_size"]
PROMPTS = [[5, 6, *range(20, 20 + length)] for length in (3, 40, 40, 90)]
ANSWERS = [[8], [9, 10], [*range(30, 60)], [*GATE_PATTERN[:3], 7]]
CHATS = [[*prompt, *GATE_PATTERN, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


def armo_head() -> dict[str, Tensor]:
    """ArmoRM's names: a gate of linear layers with biases."""
    weights = {
        "regression_layer.weight": drawn(COUNT, WIDTH, seed=1),
        "reward_transform_matrix": drawn(COUNT, COUNT, seed=2),
        "gating.logit_scale": torch.tensor([1.3]),
    }
    sizes = [WIDTH, GATE_WIDTH, GATE_WIDTH, COUNT]
    for index in range(3):
        weights[f"gating.layers.{index}.weight"] = 6 * drawn(sizes[index + 1], sizes[index], seed=10 + index)
        weights[f"gating.layers.{index}.bias"] = drawn(sizes[index + 1], seed=20 + index)
    return weights


def qrm_head() -> dict[str, Tensor]:
    """QRM's names: quantiles, and a gate of linear layers without biases, ReLU and batch norm behind each."""
    weights = armo_head() | {"regression_layer.weight": drawn(COUNT * QUANTILES, WIDTH, seed=3)}
    for index in range(3):
        weights.pop(f"gating.layers.{index}.bias")
        weights[f"gating.layers.{3 * index}.weight"] = weights.pop(f"gating.layers.{index}.weight")
    for place in (2, 5):
        for seed, part in enumerate(("weight", "bias", "running_mean", "running_var")):
            weights[f"gating.layers.{place}.{part}"] = drawn(GATE_WIDTH, seed=30 + seed).abs() + 0.1
        weights[f"gating.layers.{place}.num_batches_tracked"] = torch.tensor(7)
    return weights | {"gating.layers.6.bias": drawn(COUNT, seed=40)}


def armo_gate(head: dict[str, Tensor], state: Tensor) -> Tensor:
    for index in range(3):
        state = F.linear(state, head[f"gating.layers.{index}.weight"], head[f"gating.layers.{index}.bias"])
        state = F.relu(state) if index < 2 else state
    return torch.softmax(state / TEMPERATURE, dim=-1) * head["gating.logit_scale"]


def qrm_gate(head: dict[str, Tensor], state: Tensor) -> Tensor:
    for index in (0, 3):
        state = F.relu(F.linear(state, head[f"gating.layers.{index}.weight"]))
        mean, var, scale, shift = (
            head[f"gating.layers.{index + 2}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        state = (state - mean) / (var + 1e-5).sqrt() * scale + shift
    state = F.linear(state, head["gating.layers.6.weight"], head["gating.layers.6.bias"])
    return torch.softmax(state / TEMPERATURE, dim=-1) * head["gating.logit_scale"]


@pytest.fixture(scope="module")
def layers() -> dict[str, Tensor]:
    return body(**OPTIONS)


def gating_model(folder: Path, layers: dict[str, Tensor], head: dict[str, Tensor], name: str) -> RewardModel:
    fields: dict[str, Any] = {"num_objectives": COUNT, "num_quantiles": QUANTILES, "gating_temperature": TEMPERATURE}
    return load(write(folder, layers | head, name, options=OPTIONS, **fields))


def outputs(model: RewardModel, chats: list[list[int]]) -> np.ndarray:
    return np.array(model.scorer.outputs(chats))


def test_armorms_score_and_attributes(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    head = armo_head()
    found = outputs(gating_model(tmp_path, layers, head, "LlamaForRewardModelWithGating"), CHATS)
    for row, prompt, ids in zip(found, PROMPTS, CHATS, strict=True):
        states = hidden_states(layers, ids, **OPTIONS)
        rewards = head["regression_layer.weight"] @ states[-1]
        gate = armo_gate(head, states[len(prompt)])
        score = (gate * (rewards @ head["reward_transform_matrix"])).sum()
        np.testing.assert_allclose(row, torch.cat([score[None], rewards]).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForRewardModelWithGating3", "LlamaForRewardModelWithGating31"])
def test_qrms_score_and_attributes(tmp_path: Path, layers: dict[str, Tensor], name: str) -> None:
    head = qrm_head()
    found = outputs(gating_model(tmp_path, layers, head, name), CHATS)
    for row, prompt, ids in zip(found, PROMPTS, CHATS, strict=True):
        states = hidden_states(layers, ids, **OPTIONS)
        quantiles = (head["regression_layer.weight"] @ states[-1]).view(COUNT, QUANTILES)
        adjusted = quantiles.mean(dim=1) @ head["reward_transform_matrix"]
        score = (qrm_gate(head, states[len(prompt)]) * adjusted).sum()
        np.testing.assert_allclose(row, torch.cat([score[None], adjusted]).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.usefixtures("threads")
def test_gates_that_lie_in_shared_tokens_give_the_same_bits(
    tmp_path: Path, layers: dict[str, Tensor], num_threads: int
) -> None:
    model = gating_model(tmp_path, layers, armo_head(), "LlamaForRewardModelWithGating")
    shared = [[*PROMPTS[3], *GATE_PATTERN, 11, *range(40, 40 + length), 12] for length in (0, 1, 30, 70)]
    turns = [[*shared[3], *GATE_PATTERN, 11, *range(60, 60 + length), 12] for length in (5, 25)]
    chats = [*CHATS, *shared, *turns, shared[3][:-20]]
    torch.set_num_threads(1)
    alone = np.concatenate([outputs(model, [ids]) for ids in chats])
    torch.set_num_threads(num_threads)
    assert np.array_equal(outputs(model, chats), alone)
    assert np.array_equal(outputs(model, chats[::-1])[::-1], alone)
    model.scorer.share_prompts = False
    assert np.array_equal(outputs(model, chats), alone)


def test_a_chat_without_a_place_for_the_gate_fails_alone(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    model = gating_model(tmp_path, layers, armo_head(), "LlamaForRewardModelWithGating")
    good, bad = model.scorer.outputs([CHATS[0], [5, 6, 7, 8, 9]])
    assert isinstance(good, list)
    assert isinstance(bad, TokenIdsError)
    assert "where the prompt ends" in str(bad)


def test_a_gate_of_another_width_is_named(tmp_path: Path, layers: dict[str, Tensor]) -> None:
    head = armo_head() | {"gating.layers.2.weight": drawn(18, GATE_WIDTH)}
    with pytest.raises(WeightError, match=r"gating\.layers\.2\.weight has shape \[18, 24\].* for \[19, 24\]"):
        gating_model(tmp_path, layers, head, "LlamaForRewardModelWithGating")


def test_urms_score_and_attributes(tmp_path: Path) -> None:
    weights = body()
    head = {"score.weight": drawn(10, HIDDEN, seed=50)}
    sizes = [HIDDEN, HIDDEN, HIDDEN, 5]
    for index in range(3):
        head[f"weights.fc.{2 * index}.weight"] = drawn(sizes[index + 1], sizes[index], seed=51 + index)
        head[f"weights.fc.{2 * index}.bias"] = drawn(sizes[index + 1], seed=61 + index)
    name = "LlamaForSequenceClassificationWithNormal_Weights"
    model = load(write(tmp_path, weights | head, name, num_labels=10))
    states = last_states(weights)
    means = (states @ head["score.weight"].T)[:, ::2]
    gate = states
    for index in range(3):
        gate = F.linear(gate, head[f"weights.fc.{2 * index}.weight"], head[f"weights.fc.{2 * index}.bias"])
        gate = F.selu(gate) if index < 2 else gate
    expected = torch.cat([(means * gate).sum(dim=1, keepdim=True), means], dim=1)
    found = outputs(model, SEQUENCES)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(np.concatenate([outputs(model, [ids]) for ids in SEQUENCES]), found)
    assert model.config.head.attributes == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def test_attributes_have_their_authors_names_where_the_number_is_theirs() -> None:
    names = attribute_names("gating", 19, 1)
    assert (names[0], names[9], names[10], names[18]) == (
        "helpsteer-helpfulness",
        "ultrafeedback-helpfulness",
        "beavertails-is_safe",
        "code-readability",
    )
    assert attribute_names("gating", 2, 1) == ("attribute-0", "attribute-1")
    assert attribute_names("scalar", 19, 1) == ()
