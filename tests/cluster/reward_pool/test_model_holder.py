"""A slot's weights: asleep and back with the same bits, exchanged whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.reward_pool.errors import AsleepError, RewardPoolError, SleepError, WeightsUpdateError
from cluster.reward_pool.model_holder import ModelSlot, WeightsVersion
from serve_app.reward_model import CheckpointError, ModelSpec, RewardModel, WeightError
from tests.cluster.reward_pool.checkpoints import copied, reshaped, retrained
from tests.reward_model import classifiers, stepwise

SEQUENCES = [[1, *range(10, 10 + length), 3] for length in (5, 60, 200)]


@pytest.fixture
def folder(tiny: RewardModel, tmp_path: Path) -> Path:
    return copied(tiny.folder, tmp_path / "model")


@pytest.fixture
def slot(folder: Path) -> ModelSlot:
    slot = ModelSlot(ModelSpec(str(folder), device="cpu", dtype="float32"))
    slot.open(None, asleep=False)
    return slot


def of_retrained(slot: ModelSlot, folder: Path) -> WeightsVersion:
    return WeightsVersion(1, str(folder), None, slot.stage(str(folder), None))


def test_sleep_and_wake_keep_the_bits(slot: ModelSlot) -> None:
    before = slot.outputs(SEQUENCES)
    for _ in range(2):
        slot.sleep()
        slot.sleep()
        assert slot.is_asleep
        with pytest.raises(AsleepError, match="wake"):
            slot.outputs(SEQUENCES)
        slot.wake()
        slot.wake()
        assert slot.outputs(SEQUENCES) == before


def test_weights_whose_files_changed_are_not_taken_for_the_old_ones(slot: ModelSlot, folder: Path) -> None:
    slot.sleep()
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(SleepError, match="changed"):
        slot.wake()
    assert slot.is_asleep
    weights.write_bytes(kept)
    slot.wake()


def test_a_process_reward_model_is_exchanged_where_its_steps_stay_the_same_ids(tmp_path: Path) -> None:
    first, second = (stepwise.KINDS["qwen"].write(tmp_path / name) for name in "ab")
    slot = ModelSlot(ModelSpec(str(first), device="cpu", dtype="float32"))
    slot.open(None, asleep=False)
    assert len(slot.stage(str(second), None)) == 16
    for file in second.glob("chat_template*"):
        file.unlink()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    classifiers.change_json(second / "tokenizer_config.json", chat_template=template)
    with pytest.raises(WeightsUpdateError, match="makes other token ids"):
        slot.stage(str(second), None)


def test_an_exchange_is_final_or_taken_back(slot: ModelSlot, folder: Path, tiny: RewardModel, tmp_path: Path) -> None:
    before, version = slot.outputs(SEQUENCES), slot.version
    new = retrained(tiny.folder, tmp_path / "new")
    expected = RewardModel.from_pretrained(str(new), device="cpu", dtype="float32").scorer.outputs(SEQUENCES)
    assert expected != before

    slot.commit(of_retrained(slot, new))
    assert slot.outputs(SEQUENCES) == expected
    slot.roll_back()
    assert (slot.outputs(SEQUENCES), slot.version) == (before, version)
    slot.roll_back()
    assert slot.outputs(SEQUENCES) == before

    slot.commit(of_retrained(slot, new))
    assert slot.stage(str(folder), None) != slot.version.fingerprint  # also from one without a tokenizer
    slot.finish()
    slot.roll_back()
    assert slot.outputs(SEQUENCES) == expected
    slot.sleep()
    slot.wake()
    assert slot.outputs(SEQUENCES) == expected
    assert slot.version.number == 1


def test_an_exchange_and_sleep_empty_the_prefix_cache(folder: Path, tiny: RewardModel, tmp_path: Path) -> None:
    """Keys of other weights are never read: a new model has a cache of its own, and the old one's is empty."""
    slot = ModelSlot(ModelSpec(str(folder), device="cpu", dtype="float32", prefix_cache_bytes=1 << 20))
    slot.open(None, asleep=False)
    before, cache = slot.outputs(SEQUENCES), slot.model.scorer.prefix_cache
    assert cache is not None
    assert cache.num_kept
    slot.commit(of_retrained(slot, retrained(tiny.folder, tmp_path / "new")))
    assert not cache.num_kept
    new = [slot.outputs(SEQUENCES) for _ in range(2)]
    assert new[0] == new[1] != before
    assert slot.cached_tokens == 192  # of the longest, which the others begin as
    slot.roll_back()
    assert slot.outputs(SEQUENCES) == before
    assert slot.cached_tokens == 0
    slot.empty_cache()
    assert not cache.num_kept
    slot.sleep()
    slot.wake()
    assert slot.outputs(SEQUENCES) == before


def test_staging_alone_changes_nothing(slot: ModelSlot, tiny: RewardModel, tmp_path: Path) -> None:
    before = slot.outputs(SEQUENCES)
    slot.stage(str(retrained(tiny.folder, tmp_path / "new")), None)
    assert slot.outputs(SEQUENCES) == before
    slot.roll_back()
    with pytest.raises(WeightsUpdateError, match="no staged weights"):
        slot.commit(WeightsVersion(1, "new", None, ""))


def test_a_device_without_the_memory_keeps_the_old_weights(
    slot: ModelSlot, tiny: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = slot.outputs(SEQUENCES)
    version = of_retrained(slot, retrained(tiny.folder, tmp_path / "new"))

    def full(*args: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("cluster.reward_pool.model_holder.Decoder", full)
    with pytest.raises(WeightsUpdateError, match="out of memory"):
        slot.commit(version)
    assert slot.outputs(SEQUENCES) == before
    assert slot.version.number == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_theta": 1000}, WeightsUpdateError, "rope"),
        ({"num_hidden_layers": 4}, WeightsUpdateError, "num_layers 5 -> 4"),
        ({"reward_token_id": 4}, WeightsUpdateError, "reward_token_id 3 -> 4"),
    ],
)
def test_another_model_is_refused_by_name(
    slot: ModelSlot,
    tiny: RewardModel,
    tmp_path: Path,
    changes: dict[str, int],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        slot.stage(str(reshaped(tiny.folder, tmp_path / "other", **changes)), None)
    slot.outputs(SEQUENCES)


def test_another_tokenizer_or_broken_files_are_refused(slot: ModelSlot, tiny: RewardModel, tmp_path: Path) -> None:
    other = copied(tiny.folder, tmp_path / "other")
    config = other / "tokenizer_config.json"
    template = other / "chat_template.jinja"
    changed = template if template.is_file() else config
    changed.write_text(changed.read_text("utf-8").replace("<|im_end|>", "<|im_end|> "), "utf-8")
    with pytest.raises(WeightsUpdateError, match="other token ids"):
        slot.stage(str(other), None)
    with pytest.raises(CheckpointError, match="does not exist"):
        slot.stage(str(tmp_path / "nowhere"), None)
    (other / "model.safetensors").write_bytes(b"")
    shorter = copied(tiny.folder, tmp_path / "shorter")
    (shorter / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        slot.stage(str(shorter), None)
    assert issubclass(WeightError, CheckpointError)


def test_a_restarted_slot_takes_up_the_version(tiny: RewardModel, folder: Path, tmp_path: Path) -> None:
    new = retrained(tiny.folder, tmp_path / "new")
    first = ModelSlot(ModelSpec(str(folder), device="cpu", dtype="float32"))
    with pytest.raises(RewardPoolError, match="no model was loaded"):
        first.version  # noqa: B018
    first.open(None, asleep=False)
    version = of_retrained(first, new)
    first.commit(version)
    second = ModelSlot(ModelSpec(str(folder), device="cpu", dtype="float32"))
    second.open(version, asleep=True)
    assert second.is_asleep
    second.wake()
    assert second.outputs(SEQUENCES) == first.outputs(SEQUENCES)
    retrained(tiny.folder, tmp_path / "newer", factor=3.0).rename(tmp_path / "swap")
    (tmp_path / "swap" / "model.safetensors").replace(new / "model.safetensors")
    with pytest.raises(RewardPoolError, match="changed"):
        ModelSlot(ModelSpec(str(folder))).open(version, asleep=False)
