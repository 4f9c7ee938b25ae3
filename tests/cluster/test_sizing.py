"""The arithmetic of sizing, held against what the engine allocates and what a real checkpoint weighs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.sizing import (
    GB,
    GPUS,
    INTERNLM2_MODELS,
    MEASURED_RATES,
    bytes_per_token,
    fleet,
    flops_per_token,
    measured,
    record_rate,
    replica_size,
    throughput,
    weight_bytes,
)
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.attention import BlockAttention
from serve_app.reward_model.weights import allocate

SMALL, MIDDLE, LARGE = INTERNLM2_MODELS.values()


def test_the_shapes_are_those_of_the_real_models(shared: Path) -> None:
    assert DecoderConfig.from_folder(shared / "models" / "internlm2-1_8b-reward-files").num_parameters == (
        SMALL.num_parameters
    )
    index = shared / "models" / "internlm2-1_8b-reward-files" / "model.safetensors.index.json"
    real_bytes = json.loads(index.read_text())["metadata"]["total_size"]
    size = replica_size(SMALL, GPUS["L4"])
    assert size is not None
    assert size.disk_bytes == pytest.approx(real_bytes, rel=1e-3)
    assert size.weight_bytes == pytest.approx(real_bytes, rel=1e-3)
    billions = [config.num_parameters / 1e9 for config in (MIDDLE, LARGE)]
    assert billions == pytest.approx([6.98, 18.7], rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_as_many_bytes_as_the_engine_allocates(dtype: str, tiny: RewardModel) -> None:
    weights = allocate(tiny.config, device=torch.device("cpu"), dtype=getattr(torch, dtype))
    matrices = [weights.embedding]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.output, layer.gate_up, layer.down]
    found = sum(matrix.numel() * matrix.element_size() for matrix in matrices[1:])
    embedding = matrices[0].numel() * (2 if tiny.config.dtype == "float16" else 4)
    assert weight_bytes(tiny.config, dtype) == pytest.approx(found + embedding, rel=0.01)


def test_a_token_takes_the_buffers_of_the_decoder(tiny: RewardModel) -> None:
    """Queries, keys and values are the decoder's own buffers, what is attended to its attention's; a token's share is
    theirs.
    """
    tiny.scorer.decoder.release_buffers()  # they only grow, and other tests have used this model
    tiny.scorer.score([[1] * 1024])
    stage = tiny.scorer.decoder._stages[0]
    assert isinstance(stage.attention, BlockAttention)
    buffers = [*stage._buffers.values(), stage.attention._out]
    kept = sum(buffer.numel() for buffer in buffers) / 1024
    attention = 2 * tiny.config.query_size + 2 * tiny.config.kv_size
    assert kept == pytest.approx(attention, rel=0.1)
    assert bytes_per_token(tiny.config) > 2 * attention


@pytest.mark.parametrize(
    ("config", "gpu", "fits"),
    [
        (SMALL, "L4", True),
        (MIDDLE, "L4", True),
        (MIDDLE, "A100-40", True),
        (LARGE, "L4", False),
        (LARGE, "A100-40", False),
        (LARGE, "L40S", True),
        (LARGE, "H100", True),
    ],
)
def test_which_model_fits_which_gpu(config: DecoderConfig, gpu: str, fits: bool) -> None:
    size = replica_size(config, GPUS[gpu])
    assert (size is not None) == fits
    if size is not None:
        assert size.gpu_bytes < GPUS[gpu].memory_bytes
        assert size.token_budget % 4096 == 0


def test_eight_bit_weights_are_half() -> None:
    half, eighth = weight_bytes(LARGE, "float16"), weight_bytes(LARGE, "fp8")
    assert half - eighth == LARGE.num_parameters


def test_operations_grow_with_the_row() -> None:
    assert flops_per_token(MIDDLE, 0) == 2 * MIDDLE.num_parameters
    # 32 layers, 4,096 wide: half of 1,000 earlier tokens, 4 operations each
    assert flops_per_token(MIDDLE, 1000) - flops_per_token(MIDDLE, 0) == 32 * 4 * 4096 * 500


def test_a_fleet_finishes_in_time_or_takes_the_hours() -> None:
    tokens = 36e9  # 1,000 hours at 10,000 a second
    assert fleet(tokens, 10_000, num_replicas=1).hours == 1000
    assert fleet(tokens, 10_000, num_replicas=10).hours == pytest.approx(1000 / 9)
    found = fleet(tokens, 10_000, within_hours=24)
    assert (found.num_replicas, found.hours <= 24) == (47, True)
    assert fleet(tokens, 10_000, within_hours=1000).num_replicas == 1
    with pytest.raises(ValueError, match="num_replicas or within_hours"):
        fleet(tokens, 10_000)


def test_an_assumed_rate_says_so() -> None:
    rate = throughput(MIDDLE, GPUS["H100"], tokens_per_row=600, efficiency=0.5)
    assert rate.tokens_per_s == pytest.approx(0.5 * 989.4e12 / flops_per_token(MIDDLE, 600))
    assert "NOT measured" in rate.source


def test_a_measured_rate_is_found_by_shape_gpu_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text("[]")
    rate = {"hardware": "NVIDIA A100-SXM4-80GB", "dtype": "float16", "workload": "mixed", "source": "a benchmark"}
    for tokens_per_s in (1.0, 9876.5):  # the later one counts
        record_rate(rate | {"model": "internlm/internlm2-7b-reward", "tokens_per_s": tokens_per_s}, path=path)
    record_rate(rate | {"model": "internlm/internlm2-20b-reward", "tokens_per_s": 5.0, "workload": "long"}, path=path)
    found = measured(MIDDLE, GPUS["A100-80"], dtype="float16", path=path)
    assert found is not None
    assert (found.tokens_per_s, found.source) == (9876.5, "measured: a benchmark")
    assert measured(MIDDLE, GPUS["A100-40"], dtype="float16", path=path) is None
    assert measured(MIDDLE, GPUS["A100-80"], dtype="fp8", path=path) is None
    assert measured(SMALL, GPUS["A100-80"], dtype="float16", path=path) is None
    assert measured(LARGE, GPUS["A100-80"], dtype="float16", path=path) is None


def test_the_measured_rates_of_the_package_are_whole() -> None:
    for rate in json.loads(MEASURED_RATES.read_text()):
        assert set(rate) == {"model", "hardware", "dtype", "workload", "tokens_per_s", "source"}
        assert rate["model"] in INTERNLM2_MODELS


def test_the_gpus_have_the_names_that_ray_gives_them() -> None:
    from ray.util.accelerators import accelerators

    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA")}
    assert {gpu.ray_type for gpu in GPUS.values()} <= known
    assert all(gpu.memory_bytes % GB == 0 for gpu in GPUS.values())
