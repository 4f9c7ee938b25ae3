"""The engine's throughput, against the machine's ceiling and against what people do today.

    python -m tests.benchmarks.bench_engine --preset mid

Weights are random and made on the device. Everything compared takes turns in one run; figures are medians. Useful
tokens are those of the conversations, without padding, a shared prompt counted once for every answer to it. The
ceiling fraction is the useful tokens' matrix products over the time, as a share of the rate of bare matrix products of
the model's shapes. The last line is JSON.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import INTERNLM2, DecoderConfig, RopeConfig
from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.model import resolve_device, resolve_dtype
from serve_app.reward_model.weight_map import allocate
from tests.benchmarks.peers import PaddedPeer

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # hidden, layers, heads, key/value heads, intermediate; DESIGN: the InternLM2-Reward family, and mid
    "tiny": (128, 5, 4, 2, 384),
    "mid": (1024, 12, 16, 8, 4096),
    "1.8b": (2048, 24, 16, 8, 8192),
    "7b": (4096, 32, 32, 8, 14336),
    "20b": (6144, 48, 48, 8, 16384),
}
VOCAB_SIZE = 92544
WORKLOADS = ("mixed", "best-of-16", "uniform-short", "long")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Measure the engine on four workloads."""

    preset: Literal["tiny", "mid", "1.8b", "7b", "20b"] = "mid"
    """The model's shape."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto: bfloat16 or float32 on cpu, float16 on cuda."""
    workloads: tuple[Literal["mixed", "best-of-16", "uniform-short", "long"], ...] = (
        "mixed",
        "best-of-16",
        "uniform-short",
        "long",
    )
    """Which workloads to run."""
    repeats: int = 3
    """How often each thing is timed."""
    token_budget: int | None = None
    """Tokens in one forward pass; by default the engine's own choice."""
    peers: bool = True
    """Also time Transformers' padded batches."""
    json: bool = False
    """Print the JSON line alone."""
    save: bool = False
    """Write the JSON to tests/benchmarks/results."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_engine")
    say: Callable[[str], None] = (lambda text: None) if config.json else (lambda text: print(text, flush=True))
    model = random_model(config.preset, device=config.device, dtype=config.dtype, token_budget=config.token_budget)
    result = {
        "hardware": hardware(model.device),
        "preset": config.preset,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "token_budget": model.scorer.token_budget,
        "workloads": {name: measure(model, name, config, say) for name in config.workloads},
    }
    if config.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"bench_engine_{config.preset}_{model.device.type}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def measure(model: RewardModel, workload: str, config: BenchConfig, say: Callable[[str], None]) -> dict[str, float]:
    """The figures of one workload: everything is timed in turn, `repeats` times."""
    sequences = workload_sequences(workload)
    decoder = model.scorer.decoder
    contenders: dict[str, Callable[[], object]] = {
        "engine": lambda: model.score_token_ids(sequences),
        "unshared": lambda: unshared(model, sequences),
    }
    if config.peers:
        card = PaddedPeer.of(decoder, batch_size=8, sort=False, attention="eager")
        sdpa = PaddedPeer.of(decoder, batch_size=16, sort=True, attention="sdpa")
        contenders |= {"card": lambda: card.score(sequences), "sorted_sdpa": lambda: sdpa.score(sequences)}
    model.score_token_ids(sequences[:8])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates = []
    for _ in range(config.repeats):
        rates.append(matmul_rate(decoder))
        for name, contender in contenders.items():
            seconds[name].append(timed(contender, model.device))
    tokens = sum(map(len, sequences))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rate = statistics.median(rates)
    figures = {
        "tokens_per_s": tokens / medians["engine"],
        "conversations_per_s": len(sequences) / medians["engine"],
        "peak_bytes": peak_bytes(model.device),
        "ceiling_fraction": tokens * 2 * decoder.config.num_parameters / medians["engine"] / rate,
        "matmul_flops_per_s": rate,
    }
    for name in medians.keys() - {"engine"}:
        pairs = zip(seconds[name], seconds["engine"], strict=True)
        figures[f"vs_{name}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    ratios = ", ".join(f"{key} {value:.2f}" for key, value in sorted(figures.items()) if key.startswith("vs_"))
    say(
        f"{workload:<14} {figures['tokens_per_s']:>9,.0f} tokens/s {figures['conversations_per_s']:>8.1f} conv/s "
        f"ceiling {figures['ceiling_fraction']:.2f} of {rate / 1e9:,.0f} GFLOP/s; {ratios}"
    )
    return {name: round(value, 3) for name, value in figures.items()}


def unshared(model: RewardModel, sequences: list[list[int]]) -> None:
    """Score with every prompt computed for every answer to it."""
    model.scorer.share_prompts = False
    try:
        model.score_token_ids(sequences)
    finally:
        model.scorer.share_prompts = True


def workload_sequences(workload: str) -> list[list[int]]:
    """Token ids of a workload: random, with a fixed seed."""
    chooser = random.Random(1234)

    def ids(length: int) -> list[int]:
        return [chooser.randrange(3, 92000) for _ in range(length)]

    if workload == "mixed":
        return [ids(min(1024, max(24, round(chooser.lognormvariate(5.2, 0.8))))) for _ in range(96)]
    if workload == "best-of-16":
        prompts = [ids(512) for _ in range(4)]
        return [prompt + ids(chooser.randint(48, 192)) for prompt in prompts for _ in range(16)]
    if workload == "uniform-short":
        return [ids(32) for _ in range(256)]
    return [ids(4096) for _ in range(4)]


@torch.inference_mode()
def random_model(preset: str, *, device: str, dtype: str, token_budget: int | None = None) -> RewardModel:
    """A reward model of a preset's shape with random weights, made on the device."""
    hidden, layers, heads, kv_heads, intermediate = SHAPES[preset]
    shape = DecoderConfig(
        architecture=INTERNLM2,
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        rms_eps=1e-5,
        max_positions=32768,
        rope=RopeConfig(theta=1e6),
        reward_token_id=92527,
        dtype="float16",
    )
    target = resolve_device(device)
    weights = allocate(shape, device=target, dtype=resolve_dtype(dtype, shape, target))
    torch.manual_seed(0)
    weights.embedding.normal_()
    weights.norm.fill_(1.0)
    weights.head.normal_(std=hidden**-0.5)
    for layer in weights.layers:
        layer.attention_norm.fill_(1.0)
        layer.mlp_norm.fill_(1.0)
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down):
            matrix.normal_(std=matrix.shape[1] ** -0.5)
    return RewardModel(Decoder(shape, weights), Path(), token_budget=token_budget or "auto")


@torch.inference_mode()
def matmul_rate(decoder: Decoder, num_rows: int = 2048) -> float:
    """FLOP/s of one layer's four matrix products on `num_rows` rows, into memory that is there already."""
    layer = decoder.weights.layers[0]
    matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
    inputs = [torch.randn(num_rows, matrix.shape[1], device=decoder.device).to(matrix.dtype) for matrix in matrices]
    outputs = [x.new_empty(num_rows, matrix.shape[0]) for x, matrix in zip(inputs, matrices, strict=True)]

    def products() -> None:
        for x, matrix, out in zip(inputs, matrices, outputs, strict=True):
            torch.mm(x, matrix.t(), out=out)

    products()
    times = [timed(products, decoder.device) for _ in range(5)]
    return 2 * num_rows * sum(matrix.numel() for matrix in matrices) / statistics.median(times)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's queue included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> float:
    """The most memory taken so far: the allocator's on CUDA, the process's resident set on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def hardware(device: torch.device) -> str:
    """The device's name; for a CPU also how many threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads on {names[0] if names else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())
