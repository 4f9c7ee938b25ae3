"""Layers spread over several devices: the bits of one, and every device at work while batches are under way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.reward_pool.model_holder import ModelSlot, WeightsVersion
from cluster.sizing import INTERNLM2_MODELS
from serve_app.reward_model import DeviceError, ModelSpec, RewardModel, decoder, handover, model, scorer, token_budget
from serve_app.reward_model.device_map import embedding_bytes, layer_bytes, layers_of_devices
from serve_app.reward_model.packing import PackedBatch
from serve_app.reward_model.prefix_cache import CACHE_BLOCK_TOKENS
from serve_app.reward_model.token_budget import BudgetRecovery, available_bytes, cut_for_devices
from serve_app.reward_model.weights import allocate
from tests.cluster.reward_pool.checkpoints import retrained
from tests.goldens import WEIGHTS, make_golden
from tests.reward_model.emulated_cuda import emulate_cuda

GIB = 2**30
SEQUENCES = [[1, *range(10, 10 + length), 3] for length in (5, 60, 200, 61)]
TWO_CARDS = "cpu,cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_those_of_one_device(tiny: RewardModel, tiny_bf16: RewardModel, dtype: str) -> None:
    one = {"float32": tiny, "bfloat16": tiny_bf16}[dtype]
    for devices in (TWO_CARDS, "cpu,cpu,cpu,cpu,cpu"):
        spread = RewardModel.from_pretrained(str(one.folder), device=devices, dtype=dtype)
        assert len(spread.scorer.decoder._stages) == len(spread.devices)
        shared = [[1, *range(5, 90), token, 3] for token in (100, 200, 300)]
        assert np.array_equal(spread.score_token_ids(SEQUENCES + shared), one.score_token_ids(SEQUENCES + shared))


@pytest.mark.parametrize("variant", sorted(WEIGHTS)[:2])
def test_cudas_path_has_them_too(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_golden(variant, tmp_path / variant)
    emulate_cuda(monkeypatch)
    ids = [case["input_ids"] for case in json.loads((folder / "scores.json").read_text())[::8]]
    one, spread = (
        RewardModel.from_pretrained(str(folder), device=devices, dtype="float32", invariant=False)
        for devices in ("cpu", TWO_CARDS)
    )
    assert np.array_equal(one.score_token_ids(ids), spread.score_token_ids(ids))


@pytest.mark.parametrize("is_cuda", [False, True], ids=["cpu", "emulated cuda"])
def test_each_device_keeps_prefixes_of_its_own_layers(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that come one by one, the last ones with all of their prompt from the cache."""
    folder = make_golden(sorted(WEIGHTS)[0], tmp_path / "model")
    if is_cuda:
        emulate_cuda(monkeypatch)
    one = RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32")
    spread = RewardModel.from_pretrained(str(folder), device=TWO_CARDS, dtype="float32", prefix_cache_bytes=10**8)
    asked = [[1, *range(10, 110), token, *range(5), 3] for token in (200, 201, 202)]
    for sequence in asked:
        assert spread.score_token_ids([sequence]) == one.score_token_ids([sequence])
    assert spread.scorer.cached_tokens == 2 * (101 // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS)


def test_weights_are_exchanged_and_put_away_on_every_device(tiny: RewardModel, tmp_path: Path) -> None:
    slot, alone = (
        ModelSlot(ModelSpec(str(tiny.folder), device="cpu", dtype="float32", num_devices=count)) for count in (3, 1)
    )
    for each in (slot, alone):
        each.open(None, asleep=False)
    before = slot.outputs(SEQUENCES)
    assert slot.model.scorer.decoder.device_map.num_layers == (1, 2, 2)
    new = retrained(tiny.folder, tmp_path / "new")
    for each in (slot, alone):
        each.commit(WeightsVersion(1, str(new), None, each.stage(str(new), None)))
    assert len(slot.model.devices) == 3
    assert slot.outputs(SEQUENCES) == alone.outputs(SEQUENCES) != before
    slot.roll_back()
    slot.sleep()
    slot.wake()
    assert slot.outputs(SEQUENCES) == before


@dataclass
class SleepingCards:
    """Devices on which a layer takes as long as its rows, in time that is only counted. The host launches and goes on
    until it waits for scores, as on CUDA.
    """

    num_cards: int
    seconds_per_row: float = 1e-5
    launch_s: float = 1e-3
    host: float = 0.0
    free: list[float] = field(default_factory=list)
    runs: list[tuple[int, int, float, float]] = field(default_factory=list)
    """Batch, card, start and end of each stage's run."""
    _arrived: dict[int, float] = field(default_factory=dict)
    _batches: list[PackedBatch] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stages of decoders sleep from now on, and copies of scores take until they are there."""
        self.free = [0.0] * self.num_cards
        cards, wait = self, scorer._HostCopy.wait

        def run(stage: Any, batch: PackedBatch, hidden_TH: Tensor, cached: Any, *, is_last: bool) -> Tensor:
            cards._slept(stage, batch)
            return stage._last_rows(batch, hidden_TH) if is_last else hidden_TH

        def awaited(copy: Any) -> Any:
            cards.host = max(cards.host, cards._arrived[cards.awaited])
            cards.awaited += 1
            return wait(copy)

        patch.setattr(decoder._Stage, "run", run)
        patch.setattr(
            decoder._Stage, "_last_rows", lambda stage, batch, hidden: hidden[stage._score_rows(batch)], raising=False
        )
        patch.setattr(scorer._HostCopy, "wait", awaited)

    awaited: int = 0

    def _slept(self, stage: Any, batch: PackedBatch) -> None:
        if not self._batches or self._batches[-1] is not batch:
            self._batches.append(batch)
            self._stage = 0
        number, card = len(self._batches) - 1, self._stage
        self.host += self.launch_s
        start = max(self.host, self.free[card], self._arrived.get(number, 0.0))
        end = start + batch.num_tokens * len(stage.layers) * self.seconds_per_row
        self.free[card] = self._arrived[number] = end
        self.runs.append((number, card, start, end))
        self._stage += 1

    @property
    def busy(self) -> float:
        """The share of the cards' time in which they compute, from the first start to the last end."""
        computed = sum(end - start for _, _, start, end in self.runs)
        return computed / (self.num_cards * max(end for *_, end in self.runs))


@pytest.mark.parametrize("num_cards", [2, 4])
def test_cards_in_a_row_are_all_at_work(num_cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 0.85 of linear in one call of a batch's size, however its sequences differ in length."""
    spread = sleeping_model(num_cards, num_layers=24)
    cards = SleepingCards(num_cards)
    cards.install(monkeypatch)
    lengths = torch.randint(24, 1024, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    spread.score_token_ids([[place] * length for place, length in enumerate(lengths, start=5)])
    assert cards.busy >= 0.85
    by_batch = [
        [run for run in cards.runs if run[0] == number] for number in range(max(run[0] for run in cards.runs) + 1)
    ]
    assert all([run[1] for run in runs] == list(range(num_cards)) for runs in by_batch)
    for before, after in zip(by_batch[num_cards:], by_batch[num_cards + 1 :], strict=False):
        assert after[0][2] < before[-1][3]  # the next batch is on the first card while this one is on the last


def test_one_batch_at_a_time_would_leave_cards_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can tell: without several batches under way it shows half."""
    spread = sleeping_model(2, num_layers=24)
    monkeypatch.setattr(scorer, "cut_for_devices", lambda budget, num_rows, num_devices: budget)
    cards = SleepingCards(2)
    cards.install(monkeypatch)
    spread.score_token_ids([[5] * 500] * 60)
    assert cards.busy < 0.6


def sleeping_model(num_cards: int, *, num_layers: int) -> RewardModel:
    """A model of many thin layers over so many devices."""
    config = replace(
        INTERNLM2_MODELS["internlm/internlm2-1_8b-reward"],
        vocab_size=512,
        hidden_size=32,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=32,
    )
    weights = allocate(config, device=[torch.device("cpu")] * num_cards, dtype=torch.float32)
    for tensor in (weights.embedding, weights.norm, weights.head.layers[0].weight):
        tensor.zero_()
    return RewardModel(decoder.Decoder(config, weights), Path(), token_budget=65536)


def test_layers_are_spread_by_bytes() -> None:
    large = INTERNLM2_MODELS["internlm/internlm2-20b-reward"]
    assert layers_of_devices(large, 2, itemsize=2) == (24, 24)
    assert layers_of_devices(large, 1, itemsize=2) == (48,)
    for num_devices in (2, 3, 4, 5, 7, 8):
        counts = layers_of_devices(large, num_devices, itemsize=2)
        layer = layer_bytes(large, itemsize=2)
        loads = [count * layer for count in counts]
        loads[0] += embedding_bytes(large)
        assert sum(counts) == 48
        assert max(loads) - min(loads) <= 2 * layer
        assert max(counts) <= -(-48 // num_devices) + 1
    heavy = replace(large, vocab_size=10 * large.vocab_size)  # the embedding weighs as much as 14 layers
    first, second = layers_of_devices(heavy, 2, itemsize=2)
    assert second - first >= 12
    assert layers_of_devices(replace(heavy, num_layers=2), 2, itemsize=2) == (1, 1)
    with pytest.raises(DeviceError, match="49 devices cannot share 48 layers"):
        layers_of_devices(large, 49, itemsize=2)


def test_devices_are_named_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("cpu,cuda", "cpu,", "cuda:0,gpu", ""):
        with pytest.raises(DeviceError, match="several as 'cuda:0,cuda:1'"):
            model.usable_devices(wrong)
    with pytest.raises(DeviceError, match="no GPU on this machine"):
        ModelSpec(device="cuda", num_devices=2).load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100" if device.index < 2 else "L4")
    assert model.usable_devices("cuda:0, cuda:1") == (torch.device("cuda:0"), torch.device("cuda:1"))
    with pytest.raises(DeviceError, match="of one kind.*H100.*L4"):
        model.usable_devices("cuda:1,cuda:2")
    with pytest.raises(DeviceError, match="each named once"):
        model.usable_devices("cuda:0,cuda:0")
    with pytest.raises(DeviceError, match="has 3 GPUs"):
        model.usable_devices("cuda:2,cuda:3")


def test_a_share_of_gpus_is_a_share_of_memory_or_several_devices() -> None:
    spec = ModelSpec(device="cuda")
    assert [(one.num_devices, one.memory_share) for one in map(spec.on_gpus, (0, 0.5, 1, 2))] == [
        (1, 1.0),
        (1, 0.5),
        (1, 1.0),
        (2, 1.0),
    ]
    with pytest.raises(DeviceError, match=r"1.5 GPUs for one process"):
        spec.on_gpus(1.5)


def test_rows_are_brought_beside_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between cards: the sending stream waits for the rows, the next card's computation for their arrival."""
    told: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = str(name)

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            told.append(f"in {self.name}")

        def __exit__(self, *_: object) -> None:
            told.append("out")

    class Rows:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

        def to(self, target: torch.device, *, non_blocking: bool) -> Rows:
            assert non_blocking
            told.append(f"copy to {target}")
            return Rows(str(target))

        def record_stream(self, stream: Stream) -> None:
            told.append(f"{self.device} kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side of {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    rows: Any = Rows("cuda:0")
    assert handover.Handover.between(first, second).bring(rows).device == second
    assert told == [
        "side of cuda:0 waits for cuda:0",
        "in side of cuda:0",
        "in side of cuda:1",
        "copy to cuda:1",
        "out",
        "out",
        "cuda:1 waits for side of cuda:1",
        "cuda:0 kept for side of cuda:0",
        "cuda:1 kept for cuda:1",
    ]
    assert handover.Handover.between(first, first).bring(rows) is rows


def test_a_share_of_a_card_leaves_the_rest_to_others() -> None:
    card = 80 * GIB
    assert available_bytes(60 * GIB, card, 15 * GIB, 1.0) == 60 * GIB
    assert available_bytes(60 * GIB, card, 15 * GIB, 0.5) == 24 * GIB  # the other half is not taken yet
    assert available_bytes(10 * GIB, card, 15 * GIB, 0.5) == 10 * GIB  # a trainer has taken more than its own
    assert available_bytes(60 * GIB, card, 50 * GIB, 0.5) < 0


def test_a_budget_is_measured_on_each_card(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card with the least to spare decides; a share that the weights fill is refused."""
    cards = (torch.device("cuda:0"), torch.device("cuda:1"))
    spare = dict(zip(cards, (50 * GIB, 4 * GIB), strict=True))
    for name, answer in (
        ("empty_cache", lambda: None),
        ("reset_peak_memory_stats", lambda card: None),
        ("memory_allocated", lambda card: GIB),
        ("max_memory_allocated", lambda card: 2 * GIB),
        ("memory_reserved", lambda card: 30 * GIB),
        ("mem_get_info", lambda card: (spare[card], 80 * GIB)),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)

    class Fake:
        config = tiny.config
        devices = cards

        def release_buffers(self) -> None: ...
        def score(self, sequences: Any, branches: Any) -> Tensor:
            return torch.zeros(1, 1)

    measured = scorer._measured_budget
    fake: Any = Fake()
    assert measured(fake, 1.0) == 8192  # 0.7 of 4 GiB at 256 KiB a token and two residual streams
    spare[cards[1]] = 50 * GIB
    assert measured(fake, 1.0) > 65536 // 2
    with pytest.raises(DeviceError, match="leave nothing"):
        measured(fake, 0.25)


def test_a_call_is_cut_so_that_every_device_has_several_batches() -> None:
    assert cut_for_devices(65536, 10**6, 1) == 65536
    assert cut_for_devices(65536, 10**6, 2) == 65536
    assert cut_for_devices(65536, 65536, 2) == 5462
    assert cut_for_devices(65536, 100, 2) == 2048
    assert cut_for_devices(512, 100, 2) == 512


def passes(recovery: BudgetRecovery, budget: int, count: int) -> Iterator[int]:
    for _ in range(count):
        budget = recovery.after_pass(budget, budget)
        yield budget


def test_a_lowered_budget_recovers() -> None:
    recovery = BudgetRecovery()
    assert set(passes(recovery, 65536, 100)) == {65536}
    recovery.lowered(65536, 16384)
    budgets = list(passes(recovery, 16384, 64))
    assert (budgets[30], budgets[31], budgets[62], budgets[63]) == (16384, 32768, 32768, 65536)
    recovery.lowered(65536, 32768)  # again: it waits twice as long
    assert list(passes(recovery, 32768, 64))[62:] == [32768, 65536]
    assert list(passes(recovery, 65536, 64))[-1] == 65536
    recovery.lowered(65536, 32768)
    assert recovery.after_pass(32768, 100) == 32768  # small passes show nothing
    assert recovery.after_pass(300, 300) == 300  # somebody else's


def test_memory_that_lacks_for_a_while_lowers_the_budget_for_a_while(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_budget, "PASSES_TO_RECOVER", 4)
    spread = RewardModel.from_pretrained(str(tiny.folder), device=TWO_CARDS, dtype="float32", token_budget=1000)
    expected = spread.score_token_ids([[7] * 100] * 20)
    forward, lacking = spread.scorer.decoder.forward, True

    def short(batch: PackedBatch) -> Tensor:
        if lacking and batch.num_tokens > 300:
            raise torch.OutOfMemoryError
        return forward(batch)

    monkeypatch.setattr(spread.scorer.decoder, "forward", short)
    spread.scorer.share_prompts = False
    assert np.array_equal(spread.score_token_ids([[7] * 100] * 20), expected)
    assert spread.scorer.token_budget == 250
    lacking = False
    spread.score_token_ids([[7] * 100] * 40)
    assert spread.scorer.token_budget == 1000
