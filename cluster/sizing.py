"""GPUs, memory and time that a reward model needs: plain arithmetic over plain values, no Ray and no GPU."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.reward_model.architecture import DecoderConfig, RopeConfig
from serve_app.reward_model.device_map import embedding_bytes, layer_bytes, layers_of_devices
from serve_app.reward_model.token_budget import CUDA_CONTEXT_BYTES, budget_for, waiting_bytes

GB = 10**9
GIB = 2**30
WEIGHT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1}

# What a loading process holds beside one shard of the weights.
HOST_PROCESS_BYTES = 4 * GIB
# Hugging Face cuts checkpoints into files of at most this size; the host holds one beside the model (`checkpoint.py`).
SHARD_BYTES = 5 * GB
# Ray's default for the object store (`object_store_memory` of `ray start`), and what jobs read and write beside it.
OBJECT_STORE_SHARE = 0.3
IO_SHARE = 0.2

ASSUMED_EFFICIENCY = 0.4
"""Share of a GPU's peak that a forward pass reaches. Assumed: no GPU figure of rayward's own exists yet."""
ASSUMED_SCALING = 0.9
"""Share of linear scaling that a job reaches over its replicas: what `bench_scale` measures."""
ASSUMED_SPREAD = 0.85
"""Share of their GPUs' rate that replicas of several reach, whose layers are spread: what a simulation shows."""
MOST_GPUS_OF_REPLICA = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: what Ray calls its type, memory in bytes, and dense bfloat16 operations a second by the vendor's data
    sheet (without sparsity).
    """

    name: str
    ray_type: str
    memory_bytes: int
    peak_flops: float
    has_fp8: bool
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", "H200", 141 * GB, 989.4e12, True, "NVIDIA H200 data sheet, SXM"),
        Gpu("H100", "H100", 80 * GB, 989.4e12, True, "NVIDIA H100 data sheet, SXM"),
        Gpu("A100-80", "A100-80G", 80 * GB, 312e12, False, "NVIDIA A100 data sheet"),
        Gpu("A100-40", "A100-40G", 40 * GB, 312e12, False, "NVIDIA A100 data sheet"),
        Gpu("L40S", "L40S", 48 * GB, 362e12, False, "NVIDIA L40S data sheet"),
        Gpu("L4", "L4", 24 * GB, 121e12, False, "NVIDIA L4 data sheet"),
    )
}


def _internlm2(hidden: int, layers: int, heads: int, intermediate: int) -> DecoderConfig:
    return DecoderConfig(
        architecture="InternLM2ForRewardModel",
        vocab_size=92544,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        rms_eps=1e-5,
        max_positions=32768,
        rope=RopeConfig(theta=1e6),
        dtype="float16",
    )


INTERNLM2_MODELS = {
    "internlm/internlm2-1_8b-reward": _internlm2(2048, 24, 16, 8192),
    "internlm/internlm2-7b-reward": _internlm2(4096, 32, 32, 14336),
    "internlm/internlm2-20b-reward": _internlm2(6144, 48, 48, 16384),
}
"""Their shapes, so that nothing has to be downloaded to plan with them."""


def _of_seventy_billions(architecture: str, vocab: int, intermediate: int, max_positions: int) -> DecoderConfig:
    return DecoderConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        rms_eps=1e-5,
        max_positions=max_positions,
        rope=RopeConfig(theta=1e6),
        dtype="bfloat16",
    )


KNOWN_MODELS = INTERNLM2_MODELS | {
    "allenai/Llama-3.1-70B-Instruct-RM-RB2": _of_seventy_billions(
        "LlamaForSequenceClassification", 128256, 28672, 131072
    ),
    "Qwen/Qwen2.5-Math-RM-72B": _of_seventy_billions("Qwen2ForRewardModel", 152064, 29568, 4096),
}
"""These, and two that fit no single card of most kinds."""


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """What one replica takes of its GPUs and its host, in bytes; `token_budget` is what the engine then chooses.

    `weight_bytes` and `gpu_bytes` are those of the fullest of its `num_gpus`.
    """

    weight_bytes: int
    bytes_per_token: int
    token_budget: int
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    num_gpus: int = 1


def weight_bytes(config: DecoderConfig, dtype: str) -> int:
    """Bytes of the weights on the device: matrices in `dtype`, the embedding in the checkpoint's."""
    matrices = config.num_parameters * WEIGHT_BYTES[dtype]
    embedding = config.vocab_size * config.hidden_size * WEIGHT_BYTES[config.dtype]
    norms = (2 * config.num_layers + 2) * config.hidden_size * 4
    return matrices + embedding + norms


def bytes_per_token(config: DecoderConfig) -> int:
    """Bytes of a forward pass for each token on a GPU.

    The residual stream and one temporary of its width in float32, one in the model's dtype, then queries, keys, values
    and what is attended to of one layer, and gate and up of one MLP. Keys and values of other layers are not kept.
    """
    streams = config.hidden_size * (4 + 4 + 2)
    attention = 2 * (2 * config.query_size + 2 * config.kv_size)
    return streams + attention + 2 * 2 * config.intermediate_size


def fullest_bytes(config: DecoderConfig, dtype: str, num_gpus: int) -> int:
    """Bytes of the weights on the fullest of so many devices that share the layers."""
    if num_gpus == 1:
        return weight_bytes(config, dtype)
    itemsize = WEIGHT_BYTES[dtype]
    layers = layers_of_devices(config, num_gpus, itemsize=itemsize)
    of_layers = [count * layer_bytes(config, itemsize=itemsize) for count in layers]
    return max(of_layers[0] + embedding_bytes(config), *of_layers[1:])


def replica_size(
    config: DecoderConfig, gpu: Gpu, *, dtype: str = "float16", num_gpus: int = 1, max_tokens: int | None = None
) -> ReplicaSize | None:
    """What a replica takes of each `gpu`, with the token budget that the engine chooses there; None where it does not
    fit.

    Args:
        config: the model's shape.
        gpu: of which the replica has `num_gpus`; several share the layers.
        dtype: of the matrices.
        num_gpus: at most as many as there are layers.
        max_tokens: the longest conversation, by default the model's longest.
    """
    weights, per_token = fullest_bytes(config, dtype, num_gpus), bytes_per_token(config)
    longest = min(max_tokens or config.max_tokens, config.max_tokens)
    free = gpu.memory_bytes - CUDA_CONTEXT_BYTES - weights
    if free < longest * per_token:
        return None
    waiting = waiting_bytes(config.hidden_size, num_gpus)
    budget = budget_for(free, per_token + waiting)
    disk = config.num_parameters * WEIGHT_BYTES[config.dtype] + 2 * config.vocab_size * config.hidden_size
    return ReplicaSize(
        weight_bytes=weights,
        bytes_per_token=per_token,
        token_budget=budget,
        gpu_bytes=weights + CUDA_CONTEXT_BYTES + max(budget * (per_token + waiting), longest * per_token),
        host_bytes=min(disk, SHARD_BYTES) + HOST_PROCESS_BYTES,
        disk_bytes=disk,
        num_gpus=num_gpus,
    )


def smallest_replica(
    config: DecoderConfig, gpu: Gpu, *, dtype: str, max_tokens: int | None = None
) -> ReplicaSize | None:
    """The replica of the fewest GPUs that fits; None where more than one machine's are needed."""
    counts = range(1, min(MOST_GPUS_OF_REPLICA, config.num_layers) + 1)
    sizes = (replica_size(config, gpu, dtype=dtype, num_gpus=count, max_tokens=max_tokens) for count in counts)
    return next((size for size in sizes if size is not None), None)


def pod_memory_gib(size: ReplicaSize) -> int:
    """Memory to ask for a container with one replica, in GiB: Ray's object store takes its share of it, and so do the
    tasks of a job that read and write.
    """
    return math.ceil(size.host_bytes / (1 - OBJECT_STORE_SHARE - IO_SHARE) / GIB)


def model_volume_gib(size: ReplicaSize) -> int:
    """Disk for a model's files, in GiB, a tenth to spare."""
    return math.ceil(1.1 * size.disk_bytes / GIB)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second of one replica, and where the figure is from."""

    tokens_per_s: float
    source: str


def flops_per_token(config: DecoderConfig, tokens_per_row: float) -> float:
    """Operations for each token: two for each parameter, and attention over half of the row on average.

    Attention multiplies each query with keys and weighs values: 2 products of 2 operations over `query_size`, in each
    layer, for every earlier token.
    """
    return 2 * config.num_parameters + config.num_layers * 4 * config.query_size * tokens_per_row / 2


@dataclass(frozen=True, slots=True)
class HttpCost:
    """Milliseconds of processor time that an endpoint takes for a conversation beside its model: HAProxy, the ingress,
    which checks and tokenises, and Serve in the replica.
    """

    base_ms: float
    ms_per_token: float

    def ms(self, num_tokens: float) -> float:
        """Milliseconds for a conversation of so many tokens."""
        return self.base_ms + self.ms_per_token * num_tokens


# Measured with 58 and 596 tokens on an AMD EPYC: `bench_serve --preset tiny --only-costs --words 8`, and 100.
HTTP_ALONE, HTTP_IN_LISTS = HttpCost(1.2, 0.0019), HttpCost(0.2, 0.0008)


def throughput(config: DecoderConfig, gpu: Gpu, *, tokens_per_row: float, efficiency: float) -> Throughput:
    """What to assume where nothing was measured."""
    tokens_per_s = efficiency * gpu.peak_flops / flops_per_token(config, tokens_per_row)
    peak = f"{gpu.peak_flops / 1e12:g} TFLOP/s ({gpu.source}, bfloat16, dense)"
    return Throughput(tokens_per_s, f"assumed: {efficiency:.0%} of {peak}; NOT measured")


@dataclass(frozen=True, slots=True)
class Fleet:
    """So many replicas, of `gpus_per_replica` each, finish in so many hours."""

    num_replicas: int
    hours: float
    gpus_per_replica: int = 1

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.gpus_per_replica

    @property
    def gpu_hours(self) -> float:
        return self.num_gpus * self.hours


def fleet(
    num_tokens: float,
    tokens_per_s: float,
    *,
    num_replicas: int | None = None,
    within_hours: float | None = None,
    scaling: float = ASSUMED_SCALING,
    gpus_per_replica: int = 1,
) -> Fleet:
    """The replicas that score `num_tokens` `within_hours`, or the hours that `num_replicas` take.

    One replica reaches `tokens_per_s`, several the share `scaling` of what they would alone.
    """
    hours_alone = num_tokens / tokens_per_s / 3600
    if num_replicas is None:
        if within_hours is None:
            raise ValueError("give num_replicas or within_hours")
        num_replicas = 1 if hours_alone <= within_hours else math.ceil(hours_alone / scaling / within_hours)
    hours = hours_alone if num_replicas == 1 else hours_alone / num_replicas / scaling
    return Fleet(num_replicas, hours, gpus_per_replica)


MEASURED_RATES = Path(__file__).with_name("measured_rates.json")
"""Rates that were measured: `bench_engine --save` on a GPU adds its own."""
WORKLOAD = "mixed"


def measured(config: DecoderConfig, gpu: Gpu, *, dtype: str, path: Path = MEASURED_RATES) -> Throughput | None:
    """The rate of this model's shape on this GPU in this dtype, with its source; None where none was measured.

    `path` is a JSON list of `{"model", "hardware", "dtype", "workload", "tokens_per_s", "source"}`: a model's id, the
    name that CUDA gives the device, and `fp8` for 8-bit weights.
    """
    models = [name for name, known in INTERNLM2_MODELS.items() if _shape(known) == _shape(config)]
    for rate in json.loads(path.read_text(encoding="utf-8")):
        is_ours = rate["model"] in models and _is_gpu(gpu, rate["hardware"])
        if is_ours and rate["dtype"] == dtype and rate["workload"] == WORKLOAD:
            return Throughput(float(rate["tokens_per_s"]), f"measured: {rate['source']}")
    return None


def record_rate(rate: dict[str, Any], *, path: Path = MEASURED_RATES) -> None:
    """Put a measured rate, as `measured` reads it, in the place of an earlier one of its kind."""
    kind = ("model", "hardware", "dtype", "workload")
    others = [
        known
        for known in json.loads(path.read_text(encoding="utf-8"))
        if any(known[name] != rate[name] for name in kind)
    ]
    path.write_text(json.dumps([*others, rate], indent=2) + "\n", encoding="utf-8")


def _shape(config: DecoderConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_layers, config.num_parameters


def _is_gpu(gpu: Gpu, hardware: str) -> bool:
    """Whether CUDA's name of a device is that of the GPU, such as `NVIDIA A100-SXM4-80GB` of `A100-80`."""
    name, _, memory = gpu.name.partition("-")
    return bool(re.search(rf"\b{name}\b", hardware)) and (not memory or f"{memory}GB" in hardware)
