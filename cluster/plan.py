"""How many GPUs, hours and bytes a corpus takes: an estimate with every assumption printed.

    python -m cluster.plan --rows 100000000 --tokens-per-row 600 --model internlm/internlm2-7b-reward --gpu H100

Tokens a second are those given, else those that were measured on this GPU (`measured_rates.json`), else an
assumption. Without --replicas and --within-hours it shows what several numbers of replicas take.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal, Self

import tyro
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from cluster.sizing import (
    ASSUMED_EFFICIENCY,
    ASSUMED_SCALING,
    ASSUMED_SPREAD,
    GB,
    GPUS,
    HTTP_ALONE,
    HTTP_IN_LISTS,
    KNOWN_MODELS,
    MOST_GPUS_OF_REPLICA,
    Fleet,
    Gpu,
    ReplicaSize,
    Throughput,
    fleet,
    measured,
    replica_size,
    smallest_replica,
    throughput,
    weight_bytes,
)
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.errors import RaywardError
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.token_budget import CUDA_CONTEXT_BYTES, USED_SHARE

SHOWN_REPLICAS = (1, 2, 4, 8, 16, 32, 64)
EXIT_DOES_NOT_FIT = 1
# Text of a token in a Parquet file, uncompressed, and the four columns that jobs.score adds to a row.
TEXT_BYTES_PER_TOKEN = 4
ADDED_BYTES_PER_ROW = 10


class PlanConfig(BaseModel):
    """Estimate replicas, GPUs, hours and bytes for scoring a corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: PositiveInt
    """Conversations."""
    tokens_per_row: PositiveFloat
    """Tokens of a conversation on average; jobs.score on a sample tells it."""
    model: str = "internlm/internlm2-7b-reward"
    """A folder with a config.json, or a Hugging Face id, of which that file is fetched; the shapes of InternLM2-Reward
    are known."""
    gpu: Literal["H200", "H100", "A100-80", "A100-40", "L40S", "L4"] = "H100"
    """The GPU."""
    dtype: Literal["auto", "float16", "bfloat16", "float32", "fp8"] = "auto"
    """Of the weights; auto is the checkpoint's, fp8 needs an H100 or H200."""
    replicas: PositiveInt | None = None
    """So many replicas."""
    gpus_per_replica: PositiveInt | None = Field(default=None, le=MOST_GPUS_OF_REPLICA)
    """GPUs of one replica, which share the model's layers; by default the fewest that it fits."""
    max_tokens: PositiveInt | None = None
    """The longest conversation, where it is shorter than the model's longest."""
    within_hours: PositiveFloat | None = None
    """As many replicas as finish within so many hours."""
    tokens_per_s: PositiveFloat | None = None
    """Tokens a second of one replica, as you measured them."""
    efficiency: float = Field(default=ASSUMED_EFFICIENCY, gt=0, le=1)
    """Share of the GPU's peak to assume where nothing was measured."""
    scaling: float = Field(default=ASSUMED_SCALING, gt=0, le=1)
    """Share of linear scaling that several replicas reach."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.replicas is not None and self.within_hours is not None:
            raise ValueError("give --replicas or --within-hours, not both")
        if self.dtype == "fp8" and not GPUS[self.gpu].has_fp8:
            raise ValueError(f"fp8 needs an H100 or H200, not {self.gpu}")
        return self


def main() -> int:
    """Run the command line; the exit status: 0, or 1 where the model cannot be read or does not fit the GPU."""
    return run(tyro.cli(PlanConfig, description=__doc__, prog="python -m cluster.plan"))


def run(config: PlanConfig) -> int:
    """Print the estimate; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        text, fits = report(config)
    except RaywardError as error:
        print(f"cluster.plan stopped: {error}", file=sys.stderr)
        return EXIT_DOES_NOT_FIT
    print(text)
    return 0 if fits else EXIT_DOES_NOT_FIT


def report(config: PlanConfig) -> tuple[str, bool]:
    """The estimate in words, and whether the model fits the GPU.

    Raises:
        CheckpointError: the model's configuration cannot be read.
    """
    model, gpu = _shape(config.model), GPUS[config.gpu]
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    size = _size(config, model, gpu, dtype)
    if size is None:
        return _does_not_fit(config, model, gpu, dtype), False
    rate = _rate(config, model, gpu, dtype, size.num_gpus)
    num_tokens = config.rows * config.tokens_per_row
    fleets = [
        fleet(
            num_tokens,
            rate.tokens_per_s,
            num_replicas=count,
            within_hours=config.within_hours,
            scaling=config.scaling,
            gpus_per_replica=size.num_gpus,
        )
        for count in ((config.replicas,) if config.replicas or config.within_hours else SHOWN_REPLICAS)
    ]
    cards = _cards(size.num_gpus, config.gpu)
    lines = [
        f"{config.rows:,} rows of {config.tokens_per_row:g} tokens: {num_tokens:,.0f} tokens",
        f"{config.model} in {dtype} on {cards}: {rate.tokens_per_s:,.0f} tokens/s a replica ({rate.source})",
        "",
        *_fleet_lines(fleets),
        "",
        *_byte_lines(config, size),
        _http_line(config, rate),
        "",
        *_assumption_lines(config, size, rate),
    ]
    return "\n".join(lines), True


def _shape(name: str) -> DecoderConfig:
    return KNOWN_MODELS.get(name) or DecoderConfig.from_folder(resolve(name, None, weights=False))


def _size(config: PlanConfig, model: DecoderConfig, gpu: Gpu, dtype: str) -> ReplicaSize | None:
    if config.gpus_per_replica is None:
        return smallest_replica(model, gpu, dtype=dtype, max_tokens=config.max_tokens)
    return replica_size(model, gpu, dtype=dtype, num_gpus=config.gpus_per_replica, max_tokens=config.max_tokens)


def _rate(config: PlanConfig, model: DecoderConfig, gpu: Gpu, dtype: str, num_gpus: int) -> Throughput:
    if config.tokens_per_s is not None:
        return Throughput(config.tokens_per_s, "given with --tokens-per-s")
    assumed = throughput(model, gpu, tokens_per_row=config.tokens_per_row, efficiency=config.efficiency)
    rate = measured(model, gpu, dtype=dtype) or assumed
    if num_gpus == 1:
        return rate
    return Throughput(
        num_gpus * ASSUMED_SPREAD * rate.tokens_per_s, f"{ASSUMED_SPREAD:.0%} of {num_gpus} times {rate.source}"
    )


def _cards(num_gpus: int, name: str) -> str:
    return name if num_gpus == 1 else f"{num_gpus} {name}"


def _fleet_lines(fleets: list[Fleet]) -> list[str]:
    rows = [f"{one.num_replicas:8d} {one.num_gpus:5d} {one.hours:9.1f} {one.gpu_hours:10.1f}" for one in fleets]
    return ["replicas  GPUs     hours  GPU hours", *rows]


def _byte_lines(config: PlanConfig, size: ReplicaSize) -> list[str]:
    text = config.rows * config.tokens_per_row * TEXT_BYTES_PER_TOKEN
    added = config.rows * ADDED_BYTES_PER_ROW
    pass_bytes = size.token_budget * size.bytes_per_token
    which = "GPU memory of a replica" if size.num_gpus == 1 else "memory of its fullest GPU"
    return [
        f"{which:<26}{_gb(size.gpu_bytes)}: weights {_gb(size.weight_bytes)}, CUDA "
        f"{_gb(CUDA_CONTEXT_BYTES)}, a pass of {size.token_budget:,} tokens {_gb(pass_bytes)}",
        f"host memory of a replica  {_gb(size.host_bytes)} while it loads",
        f"disk of a node            {_gb(size.disk_bytes)} for the model's files",
        f"disk of the output        {_gb(text + added)}: the input's text and {_gb(added)} of scores, uncompressed",
    ]


def _http_line(config: PlanConfig, rate: Throughput) -> str:
    """What HTTP takes where replicas are an endpoint's."""
    num_asked = rate.tokens_per_s / config.tokens_per_row
    alone, in_lists = (num_asked * cost.ms(config.tokens_per_row) / 1000 for cost in (HTTP_ALONE, HTTP_IN_LISTS))
    return (
        f"cores of an endpoint      {alone:.2g} a replica, {in_lists:.2g} with lists of 32, for HTTP and tokenising: "
        f"{num_asked:,.0f} conversations/s"
    )


def _assumption_lines(config: PlanConfig, size: ReplicaSize, rate: Throughput) -> list[str]:
    http_ms = [cost.ms(config.tokens_per_row) for cost in (HTTP_ALONE, HTTP_IN_LISTS)]
    lines = [
        "assumed:",
        f"- several replicas reach {config.scaling:.0%} of linear scaling; start-up and loading are not counted",
        f"- {_cards(size.num_gpus, config.gpu)} for each replica, prompts shared by nobody; best-of-n data is several "
        "times faster",
        f"- a forward pass takes {size.bytes_per_token:,} bytes a token, and {USED_SHARE:.0%} of what is free at most "
        "(read off the engine's code, not measured on a GPU)",
        f"- {TEXT_BYTES_PER_TOKEN} bytes of text a token",
        f"- a conversation takes {http_ms[0]:.1f} ms of an endpoint's processors beside its model, {http_ms[1]:.1f} in "
        "lists of 32 (measured on an AMD EPYC); an ingress is one process: num_ingress_replicas",
    ]
    if size.num_gpus > 1:
        lines.append(
            f"- the {size.num_gpus} GPUs are on one node, share the layers and reach {ASSUMED_SPREAD:.0%} of their sum "
            "(a simulation; never run on GPUs)"
        )
    if "assumed" in rate.source:
        lines.append(
            f"- {config.efficiency:.0%} of the GPU's peak, for 2 operations a parameter and token, and attention. No "
            "rate of rayward was measured on this GPU: measure yours in a clone (python -m "
            "tests.benchmarks.bench_engine) and pass it with --tokens-per-s"
        )
    return lines


def _does_not_fit(config: PlanConfig, model: DecoderConfig, gpu: Gpu, dtype: str) -> str:
    longest = min(config.max_tokens or model.max_tokens, model.max_tokens)
    smallest = [
        (other.name, size)
        for other in GPUS.values()
        if (size := smallest_replica(model, other, dtype=dtype, max_tokens=longest)) is not None
    ]
    fitting = [_cards(size.num_gpus, name) for name, size in smallest]
    where = f"it fits {', '.join(fitting)}" if fitting else f"it fits {MOST_GPUS_OF_REPLICA} of none of these GPUs"
    shorter = "" if config.max_tokens else "; --max-tokens bounds it"
    num_gpus = config.gpus_per_replica or MOST_GPUS_OF_REPLICA
    cards = f"one {gpu.name} of" if num_gpus == 1 else f"{num_gpus} {gpu.name} of"
    return (
        f"{config.model} in {dtype} does not fit {cards} {_gb(gpu.memory_bytes)}: its weights are "
        f"{_gb(weight_bytes(model, dtype))}, and a conversation of {longest:,} tokens must fit beside them{shorter}; "
        f"{where}"
    )


def _gb(count: float) -> str:
    return f"{count / GB:,.1f} GB" if count < 1000 * GB else f"{count / 1000 / GB:,.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
