"""A pool of reward actors against the engine in one process: batches of 256, lone calls, and what travels.

    python -m tests.benchmarks.bench_actor --preset mid

Starts its own Ray and a pool. The model has a preset's shape and random weights, written to a temporary folder with
the embedded tokenizer; the rollouts are prompts with several responses each, as GRPO has them. The engine and the pool
take turns. Bytes are counted as they are put into the object store, against the messages as JSON. The last line is one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import pickle
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

from cluster.connect import connect
from cluster.reward_pool.pool import RewardActorPool
from serve_app.batching.wire import TokenBatch
from serve_app.reward_model import RewardModel
from tests.benchmarks.bench_engine import RESULTS, hardware
from tests.benchmarks.bench_serve import conversations, write_checkpoint

BATCH = 256
LONE_CALLS = 50


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_actor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--preset", choices=("tiny", "mid"), default="mid", help="the model's shape")
    parser.add_argument("--actors", type=int, default=1, help="how many share the batches")
    parser.add_argument("--cpus", type=float, default=2, help="CPUs, and so threads, of one actor")
    parser.add_argument("--candidates", type=int, default=8, help="responses to one prompt")
    parser.add_argument("--repeats", type=int, default=3, help="how often each batch is timed")
    parser.add_argument("--save", action="store_true", help="write the JSON to tests/benchmarks/results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="rayward-bench-"))
    try:
        write_checkpoint(folder, args.preset)
        with connect(num_cpus=4):
            result = measure(folder, args)
    finally:
        shutil.rmtree(folder)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"bench_actor_{args.preset}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure."""
    batch = rollouts(args.candidates)
    torch.set_num_threads(int(args.actors * args.cpus))
    model = RewardModel.from_pretrained(str(folder), device="cpu")
    expected = model.get_scores(batch)
    started = time.perf_counter()
    with RewardActorPool(str(folder), num_actors=args.actors, device="cpu", num_cpus=args.cpus) as pool:
        start_s = time.perf_counter() - started
        same = pool.score(batch) == expected
        in_process, in_pool = [], []
        for _ in range(args.repeats):
            in_process.append(timed(lambda: model.get_scores(batch)))
            in_pool.append(timed(lambda: pool.score(batch)))
        lone_s = statistics.median(timed(lambda: pool.score(batch[:1])) for _ in range(LONE_CALLS))
        lone_in_process_s = statistics.median(timed(lambda: model.get_score(batch[0])) for _ in range(LONE_CALLS))
        at_once_s = min(timed(lambda: asyncio.run(one_each(pool, batch))) for _ in range(args.repeats))
        put_bytes, num_puts = bytes_put(pool, batch)
    ratios = [engine / pool for engine, pool in zip(in_process, in_pool, strict=True)]
    return {
        "hardware": hardware(torch.device("cpu")),
        "preset": args.preset,
        "actors": args.actors,
        "threads_per_actor": args.cpus,
        "conversations": BATCH,
        "candidates_per_prompt": args.candidates,
        "tokens": sum(len(model.tokenizer.encode(chat)) for chat in batch),
        "same_bits": same,
        "pool_start_s": round(start_s, 2),
        "batches_per_s": round(1 / statistics.median(in_pool), 3),
        "conversations_per_s": round(BATCH / statistics.median(in_pool), 1),
        "vs_engine": round(statistics.median(ratios), 3),
        "lone_calls_per_s": round(1 / lone_s, 1),
        "lone_added_ms": round((lone_s - lone_in_process_s) * 1000, 2),
        "single_calls_at_once_per_s": round(BATCH / at_once_s, 1),
        "object_store_puts": num_puts,
        "object_store_bytes": put_bytes,
        "messages_as_json_bytes": len(json.dumps(batch)),
    }


def rollouts(candidates: int) -> list[list[dict[str, str]]]:
    """256 conversations, several responses to each prompt, shuffled."""
    texts = conversations(BATCH)
    batch = [[texts[place - place % candidates][0], texts[place][1]] for place in range(BATCH)]
    random.Random(0).shuffle(batch)
    return batch


async def one_each(pool: RewardActorPool, batch: list[Any]) -> None:
    """As many calls of one conversation, all at once."""
    await asyncio.gather(*(pool.score_async([chat]) for chat in batch))


def bytes_put(pool: RewardActorPool, batch: list[Any]) -> tuple[int, int]:
    """Bytes of token ids that one batch puts into the object store, and in how many objects."""
    put: list[int] = []
    real = ray.put

    def counting(value: Any) -> Any:
        is_batch = isinstance(value, TokenBatch)
        put.append(value.ids.nbytes + value.starts.nbytes if is_batch else len(pickle.dumps(value)))
        return real(value)

    with mock.patch("ray.put", counting):
        pool.score(batch)
    return sum(put), len(put)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
