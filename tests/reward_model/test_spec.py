"""How every door names and loads a model: resolved once, loaded the same elsewhere, refused where it cannot be."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from serve_app.reward_model import ChangedFilesError, CheckpointError, ModelSpec, RewardModel, UnsupportedDeviceError
from serve_app.reward_model.linear import check_quantization
from serve_app.reward_model.spec import ModelFacts, absolute

IDS = [[1, *range(10, 40), 3], [1, 20, 3]]


@pytest.fixture
def folder(tiny: RewardModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "model"))


def test_a_resolved_spec_loads_the_same_bits_elsewhere(
    tiny: RewardModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    spec = ModelSpec("model", device="cpu", dtype="float32", token_budget=512).resolved()
    assert (spec.model, spec.device, spec.dtype) == (str(folder), "cpu", "float32")
    assert spec.fingerprint == tiny.fingerprint
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = pickle.loads(pickle.dumps(spec)).load()
    assert model.score_token_ids(IDS).tolist() == tiny.score_token_ids(IDS).tolist()
    assert model.scorer.token_budget == 512
    assert spec.resolved() == spec


def test_the_default_is_the_embedded_model_also_where_a_folder_has_its_name(
    tiny: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec(dtype="float32", device="cpu").resolved()
    assert (spec.model, spec.revision, spec.fingerprint) == ("tiny", None, tiny.fingerprint)
    assert absolute("tiny") == "tiny"
    assert absolute("organisation/model") == "organisation/model"


def test_auto_is_settled_where_the_spec_is_resolved(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.reward_model.model.cpu_dtype", lambda: "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (ModelSpec().resolved().device, ModelSpec().resolved().dtype) == ("cpu", "bfloat16")
    there = ModelSpec(device="cuda").resolved()  # as the driver of a cluster with GPUs, which has none itself
    assert (there.device, there.dtype) == ("cuda", "float16")


def test_a_downloaded_model_is_pinned_to_its_commit(
    tiny: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(tiny.folder, tmp_path / "models--a--b" / "snapshots" / commit)
    asked: list[str | None] = []

    def resolve(model: str, revision: str | None, **_: object) -> Path:
        asked.append(revision)
        return Path(snapshot)

    monkeypatch.setattr("serve_app.reward_model.spec.resolve", resolve)
    spec = ModelSpec("a/b", revision="main", device="cpu", dtype="float32").resolved()
    assert (spec.model, spec.revision, asked) == ("a/b", commit, ["main"])


def test_other_files_are_refused_before_they_are_loaded(
    folder: Path, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(str(folder), device="cpu", dtype="float32").resolved()
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ChangedFilesError, match=f"not {tiny.fingerprint}: they changed"):
        spec.load()
    with pytest.raises(ChangedFilesError):
        spec.resolved()


def test_a_model_that_is_not_there_or_no_chat_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ModelSpec(str(folder / "nothing")).resolved()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        ModelSpec(str(folder)).resolved()


def test_fp8_is_refused_on_cpus_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.reward_model.spec.resolve", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = ModelSpec(quantization="fp8", device="cpu")
    for refused in (spec.check_device, spec.resolved, spec.load, ModelSpec(quantization="fp8").load):
        with pytest.raises(UnsupportedDeviceError, match="fp8 needs an NVIDIA GPU"):
            refused()
    ModelSpec(quantization="fp8", device="cuda").check_device()
    ModelSpec(quantization="fp8").check_device()


@pytest.mark.parametrize(("capability", "does"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_fp8_is_refused_on_gpus_before_hopper(
    capability: tuple[int, int], does: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    device = torch.device("cuda")
    check_quantization("none", device)
    if does:
        check_quantization("fp8", device)
    else:
        with pytest.raises(UnsupportedDeviceError, match="newer, not NVIDIA L4"):
            check_quantization("fp8", device)


def test_the_key_of_a_loaded_model_stands_for_what_decides_its_scores(tiny: RewardModel) -> None:
    facts = ModelFacts.of(ModelSpec(device="cpu", dtype="float32"), tiny)
    assert facts.key == f"{tiny.fingerprint}/cpu/float32/none"
    assert facts.tokenizer_fingerprint not in ("", facts.fingerprint)
    assert (facts.model, facts.token_budget) == ("tiny", tiny.scorer.token_budget)
