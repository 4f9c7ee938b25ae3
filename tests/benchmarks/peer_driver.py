"""One engine in a process of its own, timed by `bench_peers`: run by that engine's interpreter, which needs no rayward.

    PYTHON peer_driver.py vllm|rayward FOLDER

The first line that it writes says what it is: versions and threads. Each line that it reads names a JSON file with a
list of token-id sequences; it writes the seconds that these took and their raw scores. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Score = Callable[[list[list[int]]], list[float]]
MAX_TOKENS = 4096


def rayward_scores(folder: str) -> Score:
    """rayward's engine, no keys kept between calls."""
    from serve_app.reward_model import RewardModel

    model = RewardModel.from_pretrained(folder, device="cpu", dtype="bfloat16")
    return lambda sequences: [float(score) for score in model.score_token_ids(sequences)]


def vllm_scores(folder: str) -> Score:
    """vLLM's pooling runner with its prefix cache, which is emptied before each call."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # gibibytes
    from vllm import LLM, PoolingParams  # type: ignore[import-not-found]

    llm: Any = LLM(
        model=folder,
        runner="pooling",
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )

    def scores(sequences: list[list[int]]) -> list[float]:
        llm.reset_prefix_cache()
        found = llm.encode(
            [{"prompt_token_ids": sequence} for sequence in sequences],
            pooling_params=PoolingParams(use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [float(one.outputs.data.flatten()[0]) for one in found]

    return scores


ENGINES: dict[str, Callable[[str], Score]] = {"rayward": rayward_scores, "vllm": vllm_scores}


def main() -> int:
    """Answer until the input ends; the exit status."""
    engine, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the engine prints is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    scores = ENGINES[engine](folder)
    answer({"engine": engine, "versions": _versions(engine), "cores": len(os.sched_getaffinity(0))})
    for line in sys.stdin:
        with open(line.strip(), encoding="utf-8") as file:
            sequences = json.load(file)
        started = time.perf_counter()
        found = scores(sequences)
        answer({"seconds": time.perf_counter() - started, "scores": found})
    return 0


def _versions(engine: str) -> dict[str, str]:
    names = [name for name in dict.fromkeys([engine, f"{engine}-cpu", "torch"]) if _version(name)]
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
