"""The engine's throughput, against the machine's ceiling and against what people do today.

    python -m tests.benchmarks.bench_engine --preset mid

Weights are random and made on the device. Everything compared takes turns in one run; figures are medians. Useful
tokens are those of the conversations, without padding, a shared prompt counted once for every answer to it, and a
conversation that is scored after each of its turns counted once for every turn. The
ceiling fraction is the useful tokens' matrix products over the time, as a share of the rate of bare matrix products of
the model's shapes, the fastest of several ways to call them. Peers take minutes for what the engine does in seconds:
they take fewer turns and run a share of the sequences, spread evenly over all; their time per useful token counts.
"one-by-one" are the candidates of a prompt in a call each, with a prefix cache that is empty at first, and without one.
A CUDA card runs the other workloads `COPIES_ON_CUDA` times as large: else most of a pass would be its start and its
end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.sizing import INTERNLM2_MODELS, record_rate
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig, RopeConfig
from serve_app.reward_model.decoder import Decoder
from serve_app.reward_model.families import INTERNLM2
from serve_app.reward_model.linear import linear_for
from serve_app.reward_model.model import fit, resolve_device, resolve_dtype
from serve_app.reward_model.weights import DecoderWeights, allocate
from tests.benchmarks.peers import PaddedPeer

RESULTS = Path(__file__).parent / "results"
# The model whose shape a preset has.
MODELS = dict(zip(("1.8b", "7b", "20b"), INTERNLM2_MODELS, strict=True))
SHAPES = {  # hidden, layers, heads, key/value heads, intermediate; DESIGN: the InternLM2-Reward family, and mid
    "tiny": (128, 5, 4, 2, 384),
    "mid": (1024, 12, 16, 8, 4096),
    "1.8b": (2048, 24, 16, 8, 8192),
    "7b": (4096, 32, 32, 8, 14336),
    "20b": (6144, 48, 48, 8, 16384),
}
VOCAB_SIZE = 92544
Item = TypeVar("Item")
WORKLOADS = ("mixed", "best-of-16", "uniform-short", "long", "turns", "tree", "one-by-one")
REWARD_TOKEN = 92527
COPIES_ON_CUDA = 4
NUM_CONVERSATIONS, NUM_TURNS = 6, 8
TREE_DEPTH, TREE_BRANCHES = 4, 3


@dataclass(frozen=True, slots=True)
class Contenders:
    """The engine, and padded batches with the same weights."""

    model: RewardModel
    peers: dict[str, PaddedPeer]
    matrices: list[torch.Tensor]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Contenders:
        config, weights = random_weights(args.preset, device=args.device, dtype=args.dtype)
        layer = weights.layers[0]
        matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
        peers = {
            "card": PaddedPeer.of(config, weights, batch_size=8, sort=False, attention="eager"),
            "sorted_sdpa": PaddedPeer.of(config, weights, batch_size=16, sort=True, attention="sdpa"),
        }
        # The decoder takes the layers out of the list that it is given, and may lay them out anew.
        own = replace(weights, layers=list(weights.layers))
        decoder = Decoder(config, own, quantization=args.quantization, invariant=not args.any_kernel)
        if not args.any_kernel:
            fit(decoder)
        model = RewardModel(decoder, Path(), token_budget=args.token_budget or "auto")
        return cls(model, peers if args.peer_batches else {}, matrices)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_engine", description=summary)
    parser.add_argument("--preset", choices=SHAPES, default="mid", help="the model's shape")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 or float32 on cpu, float16 on cuda")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="which to run")
    parser.add_argument("--repeats", type=int, default=3, help="how often the engine is timed")
    parser.add_argument("--peer-repeats", type=int, default=1, help="how often the others are, between the engine's")
    parser.add_argument("--peer-batches", type=int, default=4, help="batches each peer runs a repeat; 0: no peers")
    parser.add_argument("--token-budget", type=int, help="tokens in one forward pass; by default the engine's choice")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="the engine's weights")
    parser.add_argument("--any-kernel", action="store_true", help="let CUDA choose kernels by batch size")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write the JSON to tests/benchmarks/results; on a GPU also the rates that cluster.plan uses",
    )
    return parser.parse_args(argv)


def main() -> int:
    """Run the benchmark; the exit status."""
    args = parse_args()
    say: Callable[[str], None] = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    contenders = Contenders.of(args)
    model = contenders.model
    result = {
        "hardware": hardware(model.device),
        "preset": args.preset,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "quantization": args.quantization,
        "invariant": not args.any_kernel,
        "token_budget": model.scorer.token_budget,
        "repeats": args.repeats,
        "workloads": {name: measure(contenders, name, args, say) for name in args.workloads},
    }
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"bench_engine_{args.preset}_{model.device.type}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        if model.device.type == "cuda" and args.preset in MODELS:
            record_rates(result)
    print(json.dumps(result))
    return 0


def record_rates(result: dict[str, Any]) -> None:
    """Hand a GPU's rates to `cluster.plan`."""
    for workload, figures in result["workloads"].items():
        record_rate(
            {
                "model": MODELS[result["preset"]],
                "hardware": result["hardware"],
                "dtype": "fp8" if result["quantization"] == "fp8" else result["dtype"],
                "workload": workload,
                "tokens_per_s": figures["tokens_per_s"],
                "source": f"bench_engine --preset {result['preset']}, torch {result['torch']}",
            }
        )


def measure(
    contenders: Contenders, workload: str, args: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, float]:
    """The figures of one workload. All ways take turns; ratios are of median seconds per token."""
    model = contenders.model
    sequences = workload_sequences(workload, copies=COPIES_ON_CUDA if model.device.type == "cuda" else 1)
    tokens = num_tokens(sequences)
    ways = ways_to_score(contenders, workload, sequences, args)
    model.score_token_ids(sequences[:8])
    for name in ways.keys() & contenders.peers if model.device.type == "cuda" else ():
        ways[name]()  # a first call there loads kernels
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates = []
    for turn in range(args.repeats):
        rates.append(matmul_rate(contenders.matrices))
        for name, way in ways.items():
            if name in ("engine", "last_alone", "uncached") or turn < args.peer_repeats:
                seconds[name].append(way())
    ours = statistics.median(seconds["engine"])
    rate = statistics.median(rates)
    figures = {
        "tokens_per_s": 1 / ours,
        "conversations_per_s": len(sequences) / (tokens * ours),
        "peak_bytes": peak_bytes(model.device),
        "ceiling_fraction": 2 * model.config.num_parameters / ours / rate,
        "matmul_flops_per_s": rate,
    }
    if "last_alone" in seconds:
        figures["times_last_alone"] = ours / statistics.median(seconds.pop("last_alone"))
    for name in list(seconds)[1:]:
        figures[f"vs_{name}"] = statistics.median(seconds[name]) / ours
    ratios = ", ".join(f"{key} {figures[key]:.2f}" for key in sorted(figures) if key.startswith(("vs_", "times_")))
    say(
        f"{workload:<14} {figures['tokens_per_s']:>9,.0f} tokens/s {figures['conversations_per_s']:>8.1f} conv/s "
        f"ceiling {figures['ceiling_fraction']:.2f} of {rate / 1e9:,.0f} GFLOP/s; {ratios}"
    )
    return {name: round(value, 3) for name, value in figures.items()}


def ways_to_score(
    contenders: Contenders, workload: str, sequences: list[list[int]], args: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """Runs of a workload by name, the engine's first, each in seconds per useful token."""
    model, tokens = contenders.model, num_tokens(sequences)
    if workload == "one-by-one":
        kept = RewardModel(
            model.scorer.decoder, Path(), token_budget=model.scorer.token_budget, prefix_cache_bytes="auto"
        )
        return {"engine": one_by_one_seconds(kept, sequences), "uncached": one_by_one_seconds(model, sequences)}
    ways: dict[str, Callable[[], float]] = {
        "engine": lambda: timed(lambda: model.score_token_ids(sequences), model.device) / tokens,
        "unshared": unshared_seconds(model, sample(sequences, max(4, len(sequences) // 4))),
    }
    if workload == "turns":
        last = sequences[NUM_TURNS - 1 :: NUM_TURNS]
        ways["last_alone"] = lambda: timed(lambda: model.score_token_ids(last), model.device) / tokens
    for name, peer in contenders.peers.items():
        batches = peer.batches(sequences)
        if len(batches) == 1:  # half of a batch of equal lengths costs half
            batches = [sample(batches[0], max(1, len(batches[0]) // 2))]
        ways[name] = peer_seconds(peer, sample(batches, args.peer_batches), model.device)
    return ways


def peer_seconds(peer: PaddedPeer, batches: Sequence[list[list[int]]], device: torch.device) -> Callable[[], float]:
    """A run of the peer over `batches`, in seconds per useful token."""
    return lambda: timed(lambda: [peer.score(batch) for batch in batches], device) / sum(map(num_tokens, batches))


def sample(items: list[Item], count: int) -> list[Item]:
    """At most `count` items, spread evenly over all."""
    step = max(1.0, len(items) / count)
    return [items[int((place + 0.5) * step)] for place in range(min(count, len(items)))]


def num_tokens(sequences: Sequence[Sequence[int]]) -> int:
    return sum(map(len, sequences))


def unshared_seconds(model: RewardModel, sequences: list[list[int]]) -> Callable[[], float]:
    """A run of the engine with every prompt computed for every answer to it, in seconds per useful token."""

    def run() -> float:
        model.scorer.share_prompts = False
        try:
            return timed(lambda: model.score_token_ids(sequences), model.device) / num_tokens(sequences)
        finally:
            model.scorer.share_prompts = True

    return run


def one_by_one_seconds(model: RewardModel, sequences: list[list[int]]) -> Callable[[], float]:
    """A run of the engine with a call for each sequence, in seconds per useful token; its cache is empty at first."""

    def calls() -> None:
        for sequence in sequences:
            model.score_token_ids([sequence])

    def run() -> float:
        if model.scorer.prefix_cache is not None:
            model.scorer.prefix_cache.forget()
        return timed(calls, model.device) / num_tokens(sequences)

    return run


def workload_sequences(workload: str, *, copies: int = 1) -> list[list[int]]:
    """Token ids of a workload: random, with a fixed seed; `copies` times as many, but of "one-by-one".

    "turns" are conversations as they are after each of their answers, "tree" the nodes of a search, from one step
    behind the prompt to `TREE_DEPTH` steps.
    """
    chooser = random.Random(1234)

    def ids(length: int) -> list[int]:
        return [chooser.randrange(3, 92000) for _ in range(length)]

    if workload == "mixed":
        return [ids(min(1024, max(24, round(chooser.lognormvariate(5.2, 0.8))))) for _ in range(96 * copies)]
    if workload in ("best-of-16", "one-by-one"):
        prompts = [ids(512) for _ in range(4 * copies if workload == "best-of-16" else 1)]
        return [prompt + ids(chooser.randint(48, 192)) for prompt in prompts for _ in range(16)]
    if workload == "uniform-short":
        return [ids(32) for _ in range(256 * copies)]
    if workload == "turns":
        return [turn for _ in range(NUM_CONVERSATIONS * copies) for turn in turns(ids, chooser)]
    if workload == "tree":
        return [node for _ in range(copies) for node in tree(ids)]
    return [ids(4096) for _ in range(4 * copies)]


def tree(ids: Callable[[int], list[int]]) -> list[list[int]]:
    """The nodes of a search, a reward token at each one's end."""
    nodes, level = [], [ids(256)]
    for _ in range(TREE_DEPTH):
        level = [node + ids(48) for node in level for _ in range(TREE_BRANCHES)]
        nodes += level
    return [[*node, REWARD_TOKEN] for node in nodes]


def turns(ids: Callable[[int], list[int]], chooser: random.Random) -> list[list[int]]:
    """One conversation after each of its answers, a reward token at each one's end."""
    whole, cut = ids(60), []
    for _ in range(NUM_TURNS):
        whole = whole + ids(chooser.randint(60, 140))
        cut.append([*whole, REWARD_TOKEN])
    return cut


@torch.inference_mode()
def random_weights(preset: str, *, device: str, dtype: str) -> tuple[DecoderConfig, DecoderWeights]:
    """A preset's shape, and random weights of it, made on the device."""
    hidden, layers, heads, kv_heads, intermediate = SHAPES[preset]
    config = DecoderConfig(
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
        reward_token_id=REWARD_TOKEN,
        dtype="float16",
    )
    target = resolve_device(device)
    weights = allocate(config, device=target, dtype=resolve_dtype(dtype, config, target))
    torch.manual_seed(0)
    weights.embedding.normal_()
    weights.norm.fill_(1.0)
    weights.head.layers[0].weight.normal_(std=hidden**-0.5)
    for layer in weights.layers:
        layer.attention_norm.fill_(1.0)
        layer.mlp_norm.fill_(1.0)
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down):
            matrix.normal_(std=matrix.shape[1] ** -0.5)
    return config, weights


@torch.inference_mode()
def matmul_rate(matrices: Sequence[torch.Tensor]) -> float:
    """FLOP/s of one layer's products: the best of plain calls and the engine's own, on 512 to 8192 rows.

    A GPU needs thousands of rows to reach its rate: with fewer the ceiling would be too low, and flatter the engine.
    """
    return max(_rate(matrices, num_rows, own=own) for num_rows in (512, 2048, 8192) for own in (False, True))


def _rate(matrices: Sequence[torch.Tensor], num_rows: int, *, own: bool) -> float:
    inputs = [torch.randn(num_rows, matrix.shape[1], device=matrix.device).to(matrix) for matrix in matrices]
    outputs = [x.new_empty(num_rows, matrix.shape[0]) for x, matrix in zip(inputs, matrices, strict=True)]
    linears = [linear_for(matrix, None) for matrix in matrices] if own else []

    def products() -> None:
        for place, x in enumerate(inputs):
            if own:
                linears[place](x)
            else:
                torch.mm(x, matrices[place].t(), out=outputs[place])

    products()
    times = [timed(products, matrices[0].device) for _ in range(3)]
    flops = 2 * num_rows * sum(matrix.numel() for matrix in matrices)
    return flops / statistics.median(times)


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
