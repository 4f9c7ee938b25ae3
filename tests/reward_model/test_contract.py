"""One conversation, one score: the same bits alone and in any batch, order, neighbourhood and number of threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.reward_model import RewardModel
from serve_app.reward_model.invariance import RowRule, find_variance
from serve_app.reward_model.linear import DenseLinear, silu_

LENGTHS = (2, 3, 4, 5, 63, 64, 65, 191, 192, 193, 511, 512, 513, 767, 768, 769)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Iterator[RewardModel]:
    name = {"float32": "golden_fp32", "bfloat16": "golden_bf16"}[request.param]
    reward_model: RewardModel = request.getfixturevalue(name)
    budget = reward_model.scorer.token_budget
    yield reward_model
    reward_model.scorer.token_budget = budget


@pytest.fixture(scope="module")
def sequences(goldens: list[dict[str, Any]]) -> list[list[int]]:
    """Every golden, and sequences of the lengths at which attention blocks and row counts turn."""
    chooser = random.Random(7)
    made = [[1, *(chooser.randrange(3, 92000) for _ in range(length - 2)), 92527] for length in LENGTHS]
    return [*(golden["input_ids"] for golden in goldens), *made]


@pytest.fixture(scope="module")
def alone(sequences: list[list[int]], golden_fp32: RewardModel, golden_bf16: RewardModel) -> dict[torch.dtype, Any]:
    """Each sequence's score when it is the only one in its batch."""
    return {
        model.dtype: np.concatenate([model.score_token_ids([ids]) for ids in sequences])
        for model in (golden_fp32, golden_bf16)
    }


@pytest.mark.parametrize(
    ("num_threads", "budget", "order"),
    [
        (1, 200, "given"),
        (1, 5000, "reversed"),
        (2, 200, "shuffled"),
        (2, 1000, "reversed"),
        (2, 5000, "given"),
        (3, 1000, "shuffled"),
        (3, 5000, "by length"),
    ],
)
@pytest.mark.usefixtures("threads")
def test_bits_are_those_of_the_sequence_alone(
    model: RewardModel,
    sequences: list[list[int]],
    alone: dict[torch.dtype, Any],
    num_threads: int,
    budget: int,
    order: str,
) -> None:
    places = list(range(len(sequences)))
    if order == "reversed":
        places.reverse()
    elif order == "by length":
        places.sort(key=lambda place: len(sequences[place]))
    elif order == "shuffled":
        random.Random(budget).shuffle(places)
    torch.set_num_threads(num_threads)
    model.scorer.token_budget = budget
    scores = model.score_token_ids([sequences[place] for place in places])
    assert np.array_equal(scores, alone[model.dtype][places])


@pytest.mark.parametrize("neighbour_length", [2, 70, 2000])
def test_bits_do_not_depend_on_the_neighbours_length(
    model: RewardModel, sequences: list[list[int]], alone: dict[torch.dtype, Any], neighbour_length: int
) -> None:
    neighbour = [1, *range(100, 98 + neighbour_length), 92527]
    model.scorer.token_budget = 10_000
    for place in range(len(sequences) - len(LENGTHS), len(sequences)):
        beside = model.score_token_ids([neighbour, sequences[place], neighbour])
        assert beside[1] == alone[model.dtype][place]


def test_every_call_gives_the_same_bits(model: RewardModel, goldens: list[dict[str, Any]]) -> None:
    conversations = [golden["messages"] for golden in goldens[:20]]
    together = model.get_scores(conversations)
    assert [model.get_score(conversation) for conversation in conversations] == together
    assert [score.value for score in model.score(conversations)] == together
    assert model.rank(conversations, return_scores=True)[1] == together
    assert model.compare(*conversations[:2], return_scores=True)[1] == together[:2]
    assert model.score_token_ids([golden["input_ids"] for golden in goldens[:20]]).tolist() == together


HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}


@pytest.mark.usefixtures("threads")
def test_the_probe_finds_nothing_that_varies_here(golden_bf16: RewardModel, golden_fp32: RewardModel) -> None:
    for model in (golden_bf16, golden_fp32):
        decoder = model.scorer.decoder
        before = torch.get_num_threads()
        assert find_variance(decoder.row_rule, decoder.linears, torch.empty(0, dtype=model.dtype), **HEADS) is None
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("rule", "shape"),
    [(RowRule(multiple=1), (256, 512)), (RowRule(multiple=16), (40, 128))],
    ids=["too few rows", "a width that is no multiple of 16"],
)
def test_the_probe_finds_what_varies(rule: RowRule, shape: tuple[int, int]) -> None:
    """In float32: a product of one row has other bits than one of four, and an odd width depends on the threads."""
    linear = DenseLinear(torch.randn(shape, generator=torch.Generator().manual_seed(1)), None)
    assert find_variance(rule, [linear], torch.empty(0), **HEADS) == f"a matrix product of shape {shape}"


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [32, 96, 8192])
@pytest.mark.usefixtures("threads")
def test_silu_gives_a_row_the_same_bits_among_any_others(num_threads: int, width: int) -> None:
    gate = torch.randn(600, width, generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(1)
    alone = torch.cat([silu_(gate[row : row + 1].clone()) for row in range(600)])
    torch.set_num_threads(num_threads)
    for num_rows in (12, 16, 47, 48, 600):
        assert torch.equal(silu_(gate[:num_rows].clone()), alone[:num_rows])
