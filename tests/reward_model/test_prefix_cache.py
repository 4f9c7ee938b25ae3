"""Prefixes kept between calls are read once, and change no bit of a score."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from serve_app.reward_model import DeviceError, NonFiniteScoreError, RewardModel
from serve_app.reward_model.families import GATE_PATTERN
from serve_app.reward_model.onednn import OneDnnLinear
from serve_app.reward_model.prefix_cache import CACHE_BLOCK_TOKENS, CPU_CACHE_BYTES, PrefixCache, cache_bytes
from serve_app.reward_model.scorer import SequenceScorer
from tests.goldens import make_golden
from tests.reward_model.emulated_cuda import emulate_cuda
from tests.reward_model.test_gating_heads import OPTIONS, armo_head, gating_model
from tests.reward_model.test_gemma import gemma2
from tests.reward_model.test_sharing import grown, rows_read
from tests.reward_model.tiny_checkpoints import body, load

BLOCK = CACHE_BLOCK_TOKENS


def with_cache(model: RewardModel, num_tokens: int) -> RewardModel:
    """The same weights with a cache of so many tokens."""
    decoder = model.scorer.decoder
    num_bytes = num_tokens // BLOCK * PrefixCache.block_bytes(decoder.config, decoder.dtype)
    return RewardModel(decoder, model.folder, prefix_cache_bytes=num_bytes)


def cache_of(model: RewardModel) -> PrefixCache:
    assert model.scorer.prefix_cache is not None
    return model.scorer.prefix_cache


def tokens_of(seed: int, length: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(6, 500) for _ in range(length)]


def scores_alone(model: RewardModel, sequences: list[list[int]]) -> np.ndarray:
    return np.concatenate([model.score_token_ids([ids]) for ids in sequences])


def test_candidates_that_come_one_by_one_read_their_prompt_once(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens_of(1, 100)
    sequences = [prompt + tokens_of(2 + place, 30) for place in range(6)]
    expected = scores_alone(tiny, sequences)
    model = with_cache(tiny, 1024)
    rows = rows_read(model, monkeypatch)
    assert np.array_equal(scores_alone(model, sequences), expected)
    assert rows == [130] + [130 - 100 // BLOCK * BLOCK] * 5
    assert cache_of(model).num_read == 5 * (100 // BLOCK * BLOCK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_conversations_scored_again_after_every_turn(
    dtype: str, request: pytest.FixtureRequest, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is a request of its own, as a trainer or an environment sends them; chosen and rejected ones."""
    model: RewardModel = request.getfixturevalue({"float32": "golden_fp32", "bfloat16": "golden_bf16"}[dtype])
    table = pq.read_table(shared / "data" / "hh_harmless" / "part-00.parquet", columns=["messages"])
    talks = [row for row in table["messages"].slice(0, 60).to_pylist() if len(row) >= 6][:6]
    longest = max(map(len, talks))
    sequences = [
        model.tokenizer.encode(talk[:end]) for end in range(2, longest + 1, 2) for talk in talks if end <= len(talk)
    ]
    expected = model.score_token_ids(sequences)
    kept = with_cache(model, 8192)
    rows = rows_read(kept, monkeypatch)
    assert np.array_equal(scores_alone(kept, sequences), expected)
    assert sum(rows) < 0.6 * sum(map(len, sequences))


@pytest.mark.parametrize("room", [64, 700, 20_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calls_of_any_sequences_with_any_room(dtype: str, room: int, request: pytest.FixtureRequest) -> None:
    """Spines and branches that go on behind cached prefixes, at any depth; pure prefixes; blocks given up between."""
    model: RewardModel = request.getfixturevalue({"float32": "tiny", "bfloat16": "tiny_bf16"}[dtype])
    if not OneDnnLinear.supports(torch.empty(0, dtype=model.dtype)):
        pytest.skip(f"oneDNN has no {model.dtype} products on this processor")
    chooser = random.Random(room)
    sequences = grown(chooser, 24)
    expected = model.score_token_ids(sequences)
    kept = with_cache(model, room)
    for budget in (100, 700, 4096):
        kept.scorer.token_budget = budget
        places = chooser.sample(range(len(sequences)), len(sequences))
        while places:
            call, places = places[:5], places[5:]
            assert np.array_equal(kept.score_token_ids([sequences[place] for place in call]), expected[call])
    assert cache_of(kept).num_read > 0
    assert cache_of(kept).num_kept <= room


@pytest.mark.parametrize("depth", [16, 31, 32, 33, 64, 1008, 1024, 1040])
def test_prefixes_of_every_alignment(tiny: RewardModel, depth: int) -> None:
    """Canonical blocks of attention have 32 rows, and 64 from position 1,024 on."""
    prompt = tokens_of(depth, depth)
    sequences = [prompt + tokens_of(place, length) for place, length in enumerate((1, 15, 16, 31, 33, 64, 65))]
    expected = tiny.score_token_ids(sequences)
    model = with_cache(tiny, 4096)
    model.score_token_ids([[*prompt, *tokens_of(99, 40)]])
    assert np.array_equal(scores_alone(model, sequences), expected)
    assert np.array_equal(model.score_token_ids(sequences), expected)
    assert cache_of(model).num_read >= len(sequences) * (depth // BLOCK * BLOCK)


def test_a_new_block_that_begins_with_loaded_rows(tiny: RewardModel) -> None:
    """One departs within a block that its predecessor in the batch has from the cache; its own block is kept, too."""
    known = tokens_of(1, 60)
    departing = [*known[:40], 5, *tokens_of(2, 49)]  # stands behind the other in a plan
    following = [*departing[:60], *tokens_of(3, 9)]
    expected = tiny.score_token_ids([known, departing, following])
    model = with_cache(tiny, 1024)
    model.score_token_ids([known])
    assert np.array_equal(model.score_token_ids([known, departing]), expected[:2])
    assert model.score_token_ids([following]) == expected[2:]
    assert cache_of(model).num_read == 2 * 48


@pytest.mark.parametrize("seed", range(2))
def test_many_small_calls(tiny: RewardModel, seed: int) -> None:
    """As requests meet in an endpoint's batches: short sequences that depart from each other anywhere."""
    chooser = random.Random(seed)
    sequences = [tokens_of(seed, 90)]
    while len(sequences) < 40:
        parent = chooser.choice(sequences)
        kept = chooser.randint(0, len(parent))
        sequences.append(parent[:kept] + tokens_of(1000 * seed + len(sequences), chooser.randint(1, 60)))
    expected = tiny.score_token_ids(sequences)
    model = with_cache(tiny, 4096)
    for _ in range(60):
        call = [chooser.randrange(40) for _ in range(chooser.randint(1, 6))]
        assert np.array_equal(model.score_token_ids([sequences[place] for place in call]), expected[call])


def windows_and_caps(folder: Path) -> RewardModel:
    torch.manual_seed(0)
    gemma2(attn_logit_softcapping=0.5, num_hidden_layers=3).save_pretrained(folder)
    return RewardModel.from_pretrained(str(folder), device="cpu", dtype="float32")


def dynamic_angles(folder: Path) -> RewardModel:
    return load(make_golden("rope-dynamic", folder / "golden"))


@pytest.mark.parametrize("make", [windows_and_caps, dynamic_angles])
def test_other_attention_and_angles_of_a_sequences_own(make: Callable[[Path], RewardModel], tmp_path: Path) -> None:
    """A sequence beyond the trained length has angles of its own where they are dynamic, and shares with nobody."""
    model = make(tmp_path)
    chooser = random.Random(8)
    prompt = [chooser.randrange(3, 60) for _ in range(90)]
    longest = model.config.longest_unstretched or 0
    ends = [1, 20, 40, max(1, longest - 90), max(30, longest - 60)]
    sequences = [prompt + [chooser.randrange(3, 60) for _ in range(end)] for end in ends for _ in range(2)]
    expected = model.score_token_ids(sequences)
    kept = with_cache(model, 2048)
    for _ in range(2):
        assert np.array_equal(scores_alone(kept, sequences), expected)
    assert cache_of(kept).num_read > 0


def test_a_gate_within_the_prompt_is_read_anew(tmp_path: Path) -> None:
    """What is read needs its own row: the cached part ends before the gate, also where the batch's spine has it."""
    model = gating_model(tmp_path, body(**OPTIONS), armo_head(), "LlamaForRewardModelWithGating")
    prompt = [*range(5, 90), *GATE_PATTERN]
    sequences = [[*prompt, *tokens_of(place, 40)] for place in range(4)] + [[*prompt, 7], prompt]
    expected = model.scorer.outputs(sequences)
    kept = with_cache(model, 1024)
    for call in (sequences[:1], sequences[1:4], sequences[::-1], sequences):
        found = kept.scorer.outputs(call)
        assert found == [expected[sequences.index(ids)] for ids in call]
    assert cache_of(kept).num_read > 0


def test_cudas_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys from the cache are gathered with those of the batch; the emulated kernels' bits are not CUDA's."""
    emulate_cuda(monkeypatch)
    model = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32", invariant=False)
    sequences = grown(random.Random(3), 12)
    expected = scores_alone(model, sequences)
    kept = with_cache(model, 900)
    for first in range(0, 12, 3):
        call = sequences[first:] + sequences[:first]
        found = kept.score_token_ids(call)
        np.testing.assert_allclose(found, np.roll(expected, -first), atol=1e-4)
    assert cache_of(kept).num_read > 0


def test_what_is_used_again_outlives_what_is_not(tiny: RewardModel) -> None:
    """Sixteen answers need more room than there is: their prompt stays, and answers go."""
    prompt, other = tokens_of(1, 4 * BLOCK), tokens_of(2, 5 * BLOCK)
    model = with_cache(tiny, 8 * BLOCK)
    cache = cache_of(model)
    for place in range(16):
        model.score_token_ids([prompt + tokens_of(10 + place, 2 * BLOCK + 1)])
        assert cache.num_kept <= 8 * BLOCK
    assert cache.num_read == 15 * len(prompt)
    cache.begin_call()
    assert cache.find([*prompt, 7], 10**6) == len(prompt)
    model.score_token_ids([[*other, 7]])  # five blocks: two old answers go, and the end of the last one
    assert cache.find([*other, 7], 10**6) == len(other)
    assert cache.find([*prompt, 7], 10**6) == 3 * BLOCK
    assert cache.find([*prompt[1:], 7], 10**6) == 0


def test_a_call_with_more_than_there_is_room_for(tiny: RewardModel) -> None:
    """It gives up nothing that it reads or has left itself: what it cannot keep it reads again."""
    model = with_cache(tiny, 3 * BLOCK)
    model.scorer.token_budget = 70
    sequences = [tokens_of(place, 60) for place in range(6)]
    expected = tiny.score_token_ids(sequences)
    for _ in range(3):
        assert np.array_equal(model.score_token_ids(sequences), expected)
    assert cache_of(model).num_read == 2 * 3 * BLOCK
    assert cache_of(model).num_kept == 3 * BLOCK


def test_a_pass_that_is_not_finite_leaves_nothing_behind(tiny: RewardModel) -> None:
    poison, clean, bad = 500, tokens_of(4, 40), tokens_of(5, 40)
    expected = tiny.score_token_ids([clean])
    model = with_cache(tiny, 1024)
    model.score_token_ids([bad])
    embedding = tiny.scorer.decoder.embedding
    before = embedding[poison].clone()
    embedding[poison] = float("inf")
    try:
        found = model.scorer.score([clean, [*bad[:32], poison, *bad[:20]]])
    finally:
        embedding[poison] = before
    assert found[0] == expected[0]
    assert isinstance(found[1], NonFiniteScoreError)
    cache = cache_of(model)
    cache.begin_call()
    assert cache.find([*bad[:32], poison, *bad[:20]], 10**6) == 32  # those of before stay
    assert np.array_equal(model.score_token_ids([clean]), expected)
    assert cache.num_kept == len(cache._blocks) * BLOCK
    assert cache._num_taken == len(cache._free) + len(cache._blocks)


def test_without_memory_the_cache_is_given_up_first(
    tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sequences = [tokens_of(place, 60) for place in range(3)]
    expected = tiny.score_token_ids(sequences)
    model = with_cache(tiny, 1024)
    model.score_token_ids(sequences[:2])
    begin, budget = PrefixCache.begin, model.scorer.token_budget

    def full(cache: PrefixCache, *args: Any) -> Any:
        begin(cache, *args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PrefixCache, "begin", full)
    assert np.array_equal(model.score_token_ids(sequences), expected)
    assert model.scorer.prefix_cache is None
    assert model.scorer.token_budget == budget
    assert "the prefix cache is given up" in caplog.text


def test_released_memory_holds_no_prefix_and_the_next_call_keeps_again(tiny: RewardModel) -> None:
    model = with_cache(tiny, 1024)
    sequence = tokens_of(1, 50)
    expected = model.score_token_ids([sequence])
    cache = cache_of(model)
    assert (cache.num_kept, len(cache._tensors)) == (48, tiny.config.num_layers)
    model.scorer.release_memory()
    assert (cache.num_kept, len(cache._tensors)) == (0, 0)
    assert np.array_equal(scores_alone(model, [sequence, sequence]), np.repeat(expected, 2))
    assert cache.num_read == 48


def test_sizes(tiny: RewardModel) -> None:
    cpu, config = torch.device("cpu"), tiny.config
    assert cache_bytes("auto", cpu) == CPU_CACHE_BYTES
    block = PrefixCache.block_bytes(config, torch.bfloat16)
    assert block == BLOCK * config.num_layers * 2 * config.kv_size * 2
    assert PrefixCache(10 * block + 1, config, torch.bfloat16).num_blocks == 10
    assert SequenceScorer(tiny.scorer.decoder, token_budget=64).prefix_cache is None
    with pytest.raises(ValueError, match=f"holds no block of 16 tokens, which takes {block} bytes; 0 keeps nothing"):
        PrefixCache(block - 1, config, torch.bfloat16)
    with pytest.raises(DeviceError, match="do not fit the device's memory beside the weights"):
        SequenceScorer(tiny.scorer.decoder, token_budget=64, prefix_cache_bytes=1 << 60)
    for wrong in (-1, 1.5, "all"):
        with pytest.raises(ValueError, match="'auto' or a whole number of bytes, 0 for none"):
            cache_bytes(wrong, cpu)  # type: ignore[arg-type]
