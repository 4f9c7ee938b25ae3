"""One conversation, one score: the same bits alone and in any batch, order, neighbourhood and number of threads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serve_app.reward_model import RewardModel
from serve_app.reward_model.invariance import RowRule, find_variance
from serve_app.reward_model.linear import DenseLinear, silu_
from serve_app.reward_model.onednn import PiecewiseLinear, run_serially
from tests.conftest import chat

LENGTHS = (2, 3, 4, 5, 63, 64, 65, 191, 192, 193, 511, 512, 513, 767, 768, 769)
REWARD = 3  # the embedded model's reward token
FIRST_TEXT_TOKEN = 6


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Iterator[RewardModel]:
    name = {"float32": "tiny", "bfloat16": "tiny_bf16"}[request.param]
    reward_model: RewardModel = request.getfixturevalue(name)
    budget = reward_model.scorer.token_budget
    yield reward_model
    reward_model.scorer.token_budget = budget


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Lengths as conversations have them, every third with the prompt of the one before, and those of `LENGTHS` last.

    At the latter attention blocks and row counts turn.
    """
    chooser = random.Random(7)

    def drawn(length: int) -> list[int]:
        return [chooser.randrange(FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + 500) for _ in range(length)]

    made: list[list[int]] = []
    for place in range(24):
        length = int(8 * 80 ** chooser.random())  # 8 to 640 tokens
        prompt = made[-1][: len(made[-1]) // 2] if place % 3 == 1 else [1]
        made.append([*prompt, *drawn(length), REWARD])
    return [*made, *([1, *drawn(length - 2), REWARD] for length in LENGTHS)]


@pytest.fixture(scope="module")
def alone(sequences: list[list[int]], tiny: RewardModel, tiny_bf16: RewardModel) -> dict[torch.dtype, Any]:
    """Each sequence's score when it is the only one in its batch."""
    return {
        model.dtype: np.concatenate([model.score_token_ids([ids]) for ids in sequences]) for model in (tiny, tiny_bf16)
    }


@pytest.mark.parametrize(
    ("num_threads", "budget", "order"),
    [
        (1, 200, "given"),
        (2, 1000, "shuffled"),
        (2, 5000, "reversed"),
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


@pytest.mark.parametrize("neighbour_length", [2, 70, 1300])
def test_bits_do_not_depend_on_the_neighbours_length(
    model: RewardModel, sequences: list[list[int]], alone: dict[torch.dtype, Any], neighbour_length: int
) -> None:
    neighbour = [1, *(FIRST_TEXT_TOKEN + place % 500 for place in range(neighbour_length - 2)), REWARD]
    model.scorer.token_budget = 10_000
    for place in range(len(sequences) - len(LENGTHS), len(sequences), 3):
        beside = model.score_token_ids([neighbour, sequences[place], neighbour[:2]])
        assert beside[1] == alone[model.dtype][place]


def test_every_call_gives_the_same_bits(model: RewardModel) -> None:
    conversations = [chat(f"Question {place}?" * place, "because " * (1 + place % 7)) for place in range(20)]
    together = model.get_scores(conversations)
    assert [model.get_score(conversation) for conversation in conversations] == together
    assert [score.value for score in model.score(conversations)] == together
    assert model.rank(conversations, return_scores=True)[1] == together
    assert model.compare(*conversations[:2], return_scores=True)[1] == together[:2]
    encoded = [model.tokenizer.encode(conversation) for conversation in conversations]
    assert model.score_token_ids(encoded).tolist() == together


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_that_run_beside_each_other_keep_the_bits(
    dtype: str, sequences: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where products are in pieces, on processors with AMX."""
    at_once: list[int] = []

    def noted(compute: Callable[[slice], Any], chunks: list[slice]) -> list[Any]:
        at_once.append(len(chunks))
        return run_serially(compute, chunks)

    monkeypatch.setattr("serve_app.reward_model.linear.varies", lambda *_: True)
    monkeypatch.setattr("serve_app.reward_model.decoder.run_serially", noted)
    torch.set_num_threads(1)
    model = RewardModel.from_pretrained("tiny", device="cpu", dtype=dtype)
    assert {type(linear) for linear in model.scorer.decoder.linears} == {PiecewiseLinear}
    alone = np.concatenate([model.score_token_ids([ids]) for ids in sequences])
    assert not at_once
    for num_threads in (2, 3, 5):
        torch.set_num_threads(num_threads)
        for ids, score in zip(sequences[::7], alone[::7], strict=True):
            assert model.score_token_ids([ids]) == score
        at_once.clear()
        assert (model.score_token_ids(sequences) == alone).all()
        assert min(at_once) >= num_threads
        assert (model.score_token_ids(sequences[::-1])[::-1] == alone).all()


def test_what_runs_serially_has_ended_when_one_of_it_fails() -> None:
    """Otherwise what is left would write where the next pass does."""
    ended: list[int] = []

    def compute(place: int) -> int:
        if place == 0:
            raise MemoryError
        time.sleep(0.02)
        assert torch.get_num_threads() == 1
        ended.append(place)
        return -place

    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert run_serially(compute, [3, 2, 1]) == [-3, -2, -1]
            ended.clear()
            with pytest.raises(MemoryError):
                run_serially(compute, [0, 1, 2, 3])
            assert len(ended) == (0 if num_threads == 1 else 3)
    finally:
        torch.set_num_threads(before)


HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}


@pytest.mark.usefixtures("threads")
def test_the_probe_finds_nothing_that_varies_here(tiny_bf16: RewardModel, tiny: RewardModel) -> None:
    for model in (tiny_bf16, tiny):
        decoder = model.scorer.decoder
        before = torch.get_num_threads()
        assert find_variance(decoder.row_rule, decoder.linears, torch.empty(0, dtype=model.dtype), **HEADS) is None
        assert torch.get_num_threads() == before


class LoneRowLinear(DenseLinear):
    """A product whose last bits are others for one row, as where a library has a kernel of its own for that."""

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        return super().__call__(x_TI, out_TO).mul_(1 + 2**-20 if len(x_TI) == 1 else 1)


class ThreadsLinear(DenseLinear):
    """A product whose last bits depend on the number of threads, as where each takes a share of a row."""

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        return super().__call__(x_TI, out_TO).mul_(1 + 2**-20 if torch.get_num_threads() == 4 else 1)


@pytest.mark.parametrize(
    ("kind", "rule"), [(LoneRowLinear, RowRule(multiple=1)), (ThreadsLinear, RowRule(multiple=16))]
)
def test_the_probe_finds_what_varies(kind: type[DenseLinear], rule: RowRule) -> None:
    linear = kind(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), None)
    assert find_variance(rule, [linear], torch.empty(0), **HEADS) == "a matrix product of shape (64, 64)"


class PlaceLinear(DenseLinear):
    """A product whose last bits depend on a row's place in its tile, as kernels that treat a tile's edge apart."""

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        out_TO = super().__call__(x_TI, out_TO)
        out_TO[:: self.tile_rows] *= 1 + 2**-20
        return out_TO


class NeighbourLinear(DenseLinear):
    """A product whose last bits depend on the row before."""

    def __call__(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        return super().__call__(x_TI, out_TO) + 1e-6 * x_TI.roll(1, dims=0)[:, :1]


@pytest.mark.parametrize("kind", [PlaceLinear, NeighbourLinear])
def test_the_probe_sees_a_rows_place_in_its_tile_and_its_neighbours(kind: type[DenseLinear]) -> None:
    linear = kind(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), None, tile_rows=16)
    assert find_variance(RowRule(multiple=16), [linear], torch.empty(0), **HEADS) is not None
    steady = DenseLinear(linear.weight, None, tile_rows=16)
    assert find_variance(RowRule(multiple=16), [steady], torch.empty(0), **HEADS) is None


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
