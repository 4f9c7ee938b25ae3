"""The first ten minutes on a card: what decides correctness first, then the figures, each step within its own limit.

    make gpu

It needs PyTorch, Transformers and pytest, neither Ray nor a network. Results are in `results/gpu-NAME.json`, and as a
table in `results/gpu-NAME.md`; a step that fails or runs out of time is named there, and the next one begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
ENGINE = "tests.benchmarks.bench_engine"
FEW = ("--repeats", "2", "--workloads", "mixed", "best-of-16")
TESTS = "tests/reward_model/test_gpu.py"
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark", *(("-n", "4") if importlib.util.find_spec("xdist") else ()))
BENCH = (ENGINE, "--peer-batches", "0", "--preset")


@dataclass(frozen=True, slots=True)
class Step:
    """A module run with `arguments` in a process of its own, for at most `limit_s` seconds."""

    name: str
    limit_s: float
    arguments: tuple[str, ...]


STEPS = (
    Step("bits of products", 60, ("tests.benchmarks.gpu_bits", "products")),
    Step("bits of attention", 30, ("tests.benchmarks.gpu_bits", "attention")),
    Step("gpu tests", 120, ("pytest", *PLUGINS, "-m", "gpu", TESTS)),
    Step("launches", 30, ("tests.benchmarks.gpu_bits", "launches", "--presets", "1.8b")),
    Step("1.8b", 60, (*BENCH, "1.8b")),
    Step("1.8b, any kernel", 30, (*BENCH, "1.8b", "--any-kernel", *FEW)),
    Step("1.8b beside padded batches", 40, (ENGINE, "--preset", "1.8b", *FEW)),
    Step("7b", 50, (*BENCH, "7b", *FEW)),
    Step("7b, fp8", 50, (*BENCH, "7b", "--dtype", "bfloat16", "--quantization", "fp8", *FEW)),
    Step("20b", 60, (*BENCH, "20b", *FEW)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's end: `status` is its exit status, or None where it ran out of time; `found` its last line of JSON."""

    name: str
    status: int | None
    seconds: float
    found: Mapping[str, Any] | None
    tail: str

    @property
    def told(self) -> str:
        if self.status is None:
            return f"ran out of its {self.seconds:.0f} s"
        if failed := len(re.findall(r"^FAILED ", self.tail, re.MULTILINE)):
            return f"{failed} failed, the others passed"
        return "done" if self.status == 0 else f"failed with status {self.status}"


def main() -> int:
    """Run the steps; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone, by name")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: this session is for a card", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_name()
    outcomes: list[Outcome] = []
    for step in STEPS:
        if arguments.only and step.name not in arguments.only:
            continue
        outcomes.append(run(step))
        print(f"{step.name}: {outcomes[-1].told} in {outcomes[-1].seconds:.0f} s", flush=True)
        write(arguments.out, card, outcomes)  # after each: a session may be cut off
    print(f"the README's row: {status_row(arguments.out)}")
    return 0 if all(outcome.status == 0 for outcome in outcomes) else 1


def run(step: Step, *, root: Path = ROOT) -> Outcome:
    """Run a step in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-m", *step.arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=step.limit_s)
    except subprocess.TimeoutExpired as error:
        said = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode(errors="replace")
        return Outcome(step.name, None, time.monotonic() - started, None, said[-4000:])
    seconds = time.monotonic() - started
    return Outcome(step.name, done.returncode, seconds, _last_json(done.stdout), (done.stdout + done.stderr)[-4000:])


def _last_json(text: str) -> Mapping[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def write(folder: Path, card: str, outcomes: Sequence[Outcome]) -> None:
    """Write what is known so far: JSON for machines, a table for people."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    data = {"card": card, "torch": torch.__version__, "steps": [asdict(outcome) for outcome in outcomes]}
    (folder / f"gpu-{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    lines = [f"# {card}", "", f"PyTorch {torch.__version__}.", "", *_table(outcomes)]
    (folder / f"gpu-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


NOT_RUN = "| GPUs | | **not run, ever**: the CUDA path is written, emulated on CPUs, and has tests marked `gpu` |"


def status_row(folder: Path = RESULTS) -> str:
    """The row on GPUs of the README's table of what has run, from the results in a folder."""
    sessions = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("gpu-*.json"))]
    if not sessions:
        return NOT_RUN
    has_run, has_not = [], []
    for session in sessions:
        outcomes = [Outcome(**step) for step in session["steps"]]
        done = [outcome for outcome in outcomes if outcome.status == 0]
        named = f"{session['card']} (PyTorch {session['torch']})"
        has_run.append(f"{named}: {', '.join(outcome.name for outcome in done) or 'nothing'}")
        missing = {step.name: "not begun" for step in STEPS} | {outcome.name: outcome.told for outcome in outcomes}
        lacking = [f"{name} ({told})" for name, told in missing.items() if told != "done"]
        if lacking:
            has_not.append(f"{session['card']}: {', '.join(lacking)}")
    doors = "several cards for one model, jobs, the endpoint, reward actors"
    return f"| GPUs | {'; '.join(has_run)} | {'; '.join([*has_not, doors])} |"


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "| step | end | seconds | figures |"
    yield "|---|---|---|---|"
    for outcome in outcomes:
        yield f"| {outcome.name} | {outcome.told} | {outcome.seconds:.0f} | {'; '.join(_figures(outcome)) or '-'} |"


def _figures(outcome: Outcome) -> Iterator[str]:
    """The figures of one step that a reader wants first."""
    found = outcome.found or {}
    for row in found.get("products", ()):
        moved = ", ".join(row["moved"]) or "none"
        alike, fastest = row["probed"], max(row["tflops"].values())
        probed = f"multiples of {alike['multiple']} up to {alike['tile_rows']} alike"
        yield f"{row['preset']} {row['dtype']}, {row['setting']}: moved {moved}, {probed}, {fastest} TFLOP/s"
    for row in found.get("attention", ()):
        yield f"{row['heads']} {row['dtype']}: differs {', '.join(row['differs']) or 'nowhere'}"
    for row in found.get("launches", ()):
        yield f"{row['rows']} rows: launched in {row['launched_ms']} ms, done in {row['done_ms']} ms"
    for workload, figures in (found.get("workloads") or {}).items():
        rate, fraction = figures["tokens_per_s"], figures["ceiling_fraction"]
        ratios = "".join(
            f", {figures[key]:.2f} times {name}"
            for key, name in {"vs_card": "the card's way", "vs_sorted_sdpa": "sorted SDPA"}.items()
            if key in figures
        )
        yield f"{workload}: {rate:,.0f} tokens/s, {fraction:.2f} of the products' rate{ratios}"


if __name__ == "__main__":
    sys.exit(main())
