"""The model of a job: resolved on the driver, in the identity of its folder and in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.connect import ClusterResources
from jobs.options import EngineOptions
from jobs.scoring.spec import identity_of_model, record_of_model, spec_of
from serve_app.reward_model import ModelSpec, RewardModel, UnsupportedDeviceError
from serve_app.reward_model.spec import ModelFacts

CPUS = ClusterResources(num_nodes=1, num_gpus=0, node_cpus=4)
GPUS = ClusterResources(num_nodes=1, num_gpus=2, node_cpus=4)


def options(**given: Any) -> EngineOptions:
    return EngineOptions.model_validate({"address": "local", "model": "tiny"} | given)


def test_what_the_options_leave_out_is_found(tiny: RewardModel) -> None:
    spec = spec_of(options(dtype="float32"), CPUS)
    assert spec == ModelSpec("tiny", None, "cpu", "float32", "auto", "none", tiny.fingerprint)
    assert spec_of(options(token_budget=512), CPUS).token_budget == 512
    assert spec_of(options(prefix_cache_bytes="auto"), CPUS).prefix_cache_bytes == "auto"
    record = {"device": "cpu", "dtype": "float32", "quantization": "none"}
    assert record_of_model(spec)["model"] == {
        "name": "tiny",
        "revision": None,
        "fingerprint": tiny.fingerprint,
        **record,
    }


def test_quantization_is_in_the_identity_where_there_is_one(tiny: RewardModel) -> None:
    """So that folders which earlier versions began without the key resume."""
    plain = identity_of_model(spec_of(options(dtype="float32"), CPUS))
    assert plain == {"model_fingerprint": tiny.fingerprint, "device": "cpu", "dtype": "float32"}
    assert identity_of_model(spec_of(options(dtype="float32", quantization="none"), CPUS)) == plain
    fp8 = spec_of(options(quantization="fp8", dtype="bfloat16"), GPUS)
    assert identity_of_model(fp8) == {
        "model_fingerprint": tiny.fingerprint,
        "device": "cuda",
        "dtype": "bfloat16",
        "quantization": "fp8",
    }
    assert (fp8.quantization, record_of_model(fp8)["model"]["quantization"]) == ("fp8", "fp8")


def test_own_actors_and_replicas_with_the_same_model_have_one_identity(tiny: RewardModel) -> None:
    spec = spec_of(options(dtype="float32"), CPUS)
    assert identity_of_model(ModelFacts.of(spec, tiny)) == identity_of_model(spec)


def test_what_devices_cannot_do_is_refused_with_the_options_or_before_any_actor_starts(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--gpus-per-actor 2.5: an actor takes a part of a GPU"):
        options(gpus_per_actor=2.5)
    with pytest.raises(ValidationError, match="--quantization fp8 with --device cpu"):
        options(quantization="fp8", device="cpu")
    with pytest.raises(UnsupportedDeviceError, match="fp8 needs an NVIDIA GPU"):
        spec_of(options(quantization="fp8"), CPUS)
