"""The endpoint against the engine in one process: throughput of many clients, latency of one, and overload; and the
candidates of a prompt one after another, with a prefix cache and without.

    python -m tests.benchmarks.bench_serve --preset mid

Starts its own Ray and an endpoint of one replica on a free port. The model has a preset's shape and random weights,
written to a temporary folder with the embedded tokenizer. The in-process engine runs before and after the endpoint is
asked; the median of both counts. The candidates go in turn to two models that differ in the cache alone, each time with
another prompt. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import torch
from safetensors.torch import save_file

from cluster.connect import connect
from cluster.serve import has_haproxy
from serve_app.replica import Load
from serve_app.reward_model import ModelSpec, RewardModel
from serve_app.reward_model.model_files import resolve
from serve_app.web.proxy import PROXY_ENVIRONMENT, haproxy_environment
from tests.benchmarks.bench_engine import RESULTS, SHAPES, hardware

WORDS = ("the", "sea", "is", "wide", "while", "rivers", "run", "to", "it", "from", "hills", "since", "spring")
MODEL_NAME = "bench"
NUM_CLIENTS = 64
LIST_CLIENTS, LIST, LONG_LIST, LONE = 4, 32, 1000, 30
INGRESSES = (1, 2)
PAUSE_S = 0.01
NUM_CANDIDATES = 16
PROMPT_TOKENS = 512
ANSWER_TOKENS = (48, 192)
WAITED_S = 30.0
NO_ANSWER = 0
"""In place of the status of a request whose connection was refused or broke."""
MAX_OPEN = 15_000
"""Requests under way at once: each holds a file, and a process may open some 20,000. Those beyond are not sent."""


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_serve", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--preset", choices=("tiny", "mid"), default="mid", help="the model's shape")
    parser.add_argument("--conversations", type=int, default=128, help="how many the 64 clients ask for, one at a time")
    parser.add_argument("--overload-s", type=float, default=60.0, help="how long five times too much is offered")
    parser.add_argument("--prompts", type=int, default=3, help="prompts whose candidates come one after another")
    parser.add_argument("--only-candidates", action="store_true", help="measure nothing else")
    parser.add_argument("--only-rates", action="store_true", help="leave the candidates out")
    parser.add_argument(
        "--only-costs",
        action="store_true",
        help="measure the processor time of each process alone, with a model that answers at once",
    )
    parser.add_argument(
        "--haproxy", action=argparse.BooleanOptionalAction, default=has_haproxy(), help="as `rayward serve` has it"
    )
    parser.add_argument("--words", type=int, help="words of each message, for conversations of one length")
    parser.add_argument("--save", action="store_true", help="write the JSON to tests/benchmarks/results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="rayward-bench-"))
    os.environ.update(PROXY_ENVIRONMENT | (haproxy_environment(folder) if args.haproxy else {}))
    try:
        write_checkpoint(folder, args.preset)
        result = costs(folder, args) if args.only_costs else figures_of(folder, args)
    finally:
        shutil.rmtree(folder)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"bench_serve_{args.preset}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def figures_of(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures that the options name."""
    figures = {} if args.only_candidates else measure(folder, args)
    return figures if args.only_rates else figures | {"one_by_one": one_by_one(folder, args.prompts)}


def costs(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Conversations a second and each process's milliseconds of processor time for one, by the number of ingresses,
    where conversations come alone and in lists; the model answers at once.
    """
    chats = list(conversations(args.conversations, args.words))
    tokenizer = RewardModel.from_pretrained(str(folder), device="cpu").tokenizer
    found: dict[str, Any] = {}
    for num_ingresses in INGRESSES:
        with endpoint(folder, num_ingresses=num_ingresses, load=instant) as url:
            for kind, clients, per_request in (("alone", NUM_CLIENTS, 1), (f"lists of {LIST}", LIST_CLIENTS, LIST)):
                asyncio.run(ask_all(url, chats[: clients * per_request], num_clients=clients, per_request=per_request))
                before = processor_seconds()
                taken_s, _ = asyncio.run(ask_all(url, chats, num_clients=clients, per_request=per_request))
                found[f"{kind}, {num_ingresses} ingress"] = {
                    "conversations_per_s": round(len(chats) / taken_s, 1),
                    "processor_ms_per_conversation": per_conversation(before, len(chats)),
                }
    return {
        "hardware": hardware(torch.device("cpu")),
        "proxy": "HAProxy" if args.haproxy else "Serve's",
        "tokens_per_conversation": round(statistics.mean(len(tokenizer.encode(chat)) for chat in chats), 1),
        **found,
    }


def instant(spec: ModelSpec) -> RewardModel:
    """The model of `spec`, which scores nothing and says 0."""
    model = spec.load()
    model.scorer.outputs = lambda sequences: [[0.0] for _ in sequences]  # type: ignore[method-assign]
    return model


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure. The endpoint's prefix cache knows no conversation: only under overload is one asked for twice."""
    count = args.conversations
    made = iter(conversations(4 * count + LONG_LIST + LONE + NUM_CLIENTS, args.words))
    chats, again, listed, others = (list(islice(made, count)) for _ in range(4))
    long_list, lone_chats, warm_up = list(islice(made, LONG_LIST)), list(islice(made, LONE)), list(made)
    model = RewardModel.from_pretrained(str(folder), device="cpu")
    expected = model.get_scores(chats)
    in_process = [rate_in_process(model, again)]
    lone_in_process = lone_latency_in_process(model, lone_chats)
    with endpoint(folder) as url:
        asyncio.run(ask_all(url, warm_up, num_clients=NUM_CLIENTS))
        before = processor_seconds()
        many = [asyncio.run(ask_all(url, each, num_clients=NUM_CLIENTS)) for each in (chats, again)]
        spent = per_conversation(before, 2 * count)
        tokens_per_batch = mean_batch_tokens()
        lone = lone_latency(url, lone_chats)
        lists_s, _ = asyncio.run(ask_all(url, listed, num_clients=LIST_CLIENTS, per_request=LIST))
        long_list_s, _ = asyncio.run(ask_all(url, long_list, per_request=LONG_LIST))
        long_list_rate = rate_in_process(model, long_list)
        capacity = statistics.median(count / seconds for seconds, _ in many)
        overload = asyncio.run(offer(url, others, rate=5 * capacity, seconds=args.overload_s))
    in_process.append(rate_in_process(model, chats))
    batch_tokens = statistics.mean(len(model.tokenizer.encode(chat)) for chat in chats)
    return {
        "hardware": hardware(torch.device("cpu")),
        "preset": args.preset,
        "proxy": "HAProxy" if args.haproxy else "Serve's",
        "clients": NUM_CLIENTS,
        "engine_conversations_per_s": round(statistics.median(in_process), 2),
        "endpoint_conversations_per_s": round(capacity, 2),
        "vs_engine": round(capacity / statistics.median(in_process), 3),
        "lists_of_32_vs_engine": round(count / lists_s / statistics.median(in_process), 3),
        "list_of_1000_seconds_vs_engine": round(long_list_s * long_list_rate / LONG_LIST, 3),
        "tokens_per_conversation": round(batch_tokens, 1),
        "lone_added_ms": round((lone - lone_in_process) * 1000, 2),
        "lone_in_process_ms": round(lone_in_process * 1000, 2),
        "processor_ms_per_conversation": spent,
        "tokens_per_batch": tokens_per_batch,
        "same_scores": many[0][1] == expected,
        "overload": overload | {"goodput_vs_capacity": round(overload["accepted_per_s"] / capacity, 3)},
    }


def one_by_one(folder: Path, num_prompts: int) -> dict[str, Any]:
    """Candidates a second of one client that asks for one at a time, with a cache and without, and their ratio.

    The ratio is the median over prompts; between those of a kind, every prompt is new to the cache.
    """
    model = RewardModel.from_pretrained(str(folder), device="cpu")
    chooser = random.Random(77)
    cases = [candidates(model, chooser) for _ in range(num_prompts)]
    seconds: dict[str, list[float]] = {name: [] for name in ("cached", "uncached")}
    same = True
    with endpoint(folder, {"cached": {}, "uncached": {"prefix_cache_bytes": 0}}) as url:
        for name in seconds:
            asyncio.run(ask_all(url, candidates(model, chooser), num_clients=1, model=name))
        for case in cases:
            expected = model.get_scores(case)
            for name, taken in seconds.items():
                elapsed, scores = asyncio.run(ask_all(url, case, num_clients=1, model=name))
                taken.append(elapsed)
                same &= scores == expected
    ratios = [plain / kept for kept, plain in zip(seconds["cached"], seconds["uncached"], strict=True)]
    return {
        "hardware": hardware(torch.device("cpu")),
        "prompts": num_prompts,
        "candidates": NUM_CANDIDATES,
        **{f"{name}_per_s": round(NUM_CANDIDATES / statistics.median(taken), 2) for name, taken in seconds.items()},
        "times_as_fast": round(statistics.median(ratios), 2),
        "same_scores": same,
    }


def candidates(model: RewardModel, chooser: random.Random) -> list[Any]:
    """Answers to one prompt of `PROMPT_TOKENS` tokens or a few more, each of `ANSWER_TOKENS`."""

    def text(num_tokens: int) -> str:
        words = chooser.choices(WORDS, k=num_tokens)
        low, high = 1, num_tokens
        while low < high:
            middle = (low + high) // 2
            enough = len(model.tokenizer.encode([{"role": "user", "content": " ".join(words[:middle])}])) >= num_tokens
            low, high = (low, middle) if enough else (middle + 1, high)
        return " ".join(words[:low])

    prompt = {"role": "user", "content": text(PROMPT_TOKENS)}
    answers = [text(chooser.randint(*ANSWER_TOKENS)) for _ in range(NUM_CANDIDATES)]
    return [[prompt, {"role": "assistant", "content": answer}] for answer in answers]


def rate_in_process(model: RewardModel, chats: list[Any]) -> float:
    """Conversations a second of one call for all of them."""
    started = time.perf_counter()
    model.get_scores(chats)
    return len(chats) / (time.perf_counter() - started)


def lone_latency_in_process(model: RewardModel, chats: list[Any]) -> float:
    """Median seconds of one conversation, alone, each after a pause: a processor that has rested is slower at first."""
    return statistics.median(_timed_after_pause(partial(model.get_score, chat)) for chat in chats)


def lone_latency(url: str, chats: list[Any]) -> float:
    """The same over HTTP."""
    with httpx.Client(base_url=url, timeout=60) as client:

        def ask(chat: Any) -> None:
            client.post("/v1/score", json={"conversations": [chat]}).raise_for_status()

        return statistics.median(_timed_after_pause(partial(ask, chat)) for chat in chats)


async def ask_all(
    url: str, chats: list[Any], *, num_clients: int = 1, per_request: int = 1, model: str = MODEL_NAME
) -> tuple[float, list[float]]:
    """Seconds until clients with one request in flight each have asked for all, and the scores in order."""
    scores = [0.0] * len(chats)
    waiting = iter(range(0, len(chats), per_request))

    async def client() -> None:
        for place in waiting:
            body = {"model": model, "conversations": chats[place : place + per_request]}
            async with http.post("/v1/score", json=body) as response:
                response.raise_for_status()
                for result in (await response.json())["results"]:
                    scores[place + result["index"]] = result["score"]

    async with session(url) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return time.perf_counter() - started, scores


async def offer(url: str, chats: list[Any], *, rate: float, seconds: float) -> dict[str, Any]:
    """Send `rate` requests a second, whatever comes back, and count what does."""
    chooser = random.Random(0)
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    without_retry_after = 0
    memory = [replica_bytes()]

    async with session(url) as http:

        async def one() -> None:
            nonlocal without_retry_after
            began = time.perf_counter()
            try:
                async with http.post("/v1/score", json={"conversations": [chooser.choice(chats)]}) as response:
                    await response.read()
            except aiohttp.ClientError:
                statuses[NO_ANSWER] += 1
                return
            statuses[response.status] += 1
            if response.status == 200:
                latencies.append(time.perf_counter() - began)
            elif "Retry-After" not in response.headers:
                without_retry_after += 1

        started = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        due = sent = 0
        while (now := time.perf_counter() - started) < seconds:
            while due < now * rate:
                due += 1
                if len(tasks) < MAX_OPEN:
                    tasks.add(task := asyncio.create_task(one()))
                    task.add_done_callback(tasks.discard)
                    sent += 1
            await asyncio.sleep(min(0.05, 1 / rate))
            if len(memory) < now / 5:
                memory.append(replica_bytes())
        done = statuses[200]
        await asyncio.gather(*tasks)
    latencies.sort()
    return {
        "offered_per_s": round(sent / seconds, 2),
        "not_sent": due - sent,
        "accepted_per_s": round(done / seconds, 2),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "refusals_without_retry_after": without_retry_after,
        "accepted_p50_s": round(latencies[len(latencies) // 2], 3) if latencies else None,
        "accepted_p99_s": round(latencies[int(len(latencies) * 0.99)], 3) if latencies else None,
        "max_wait_s": WAITED_S,
        "memory_growth": round(max(memory) / memory[0], 3),
    }


def session(url: str) -> aiohttp.ClientSession:
    """A client for thousands of requests at once; with httpx the client itself would be the bottleneck."""
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600))


def mean_batch_tokens(timeout_s: float = 30.0) -> float | None:
    """The mean size of the batches so far, from the metrics of Ray's node; None where it exports none."""
    import ray

    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            lines = httpx.get(address, timeout=5).text.splitlines()
        except httpx.HTTPError:
            return None
        parts = [
            sum(
                float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith(f"ray_rayward_batch_tokens_{part}{{")
            )
            for part in ("sum", "count")
        ]
        if parts[1]:
            return round(parts[0] / parts[1], 1)
        time.sleep(2)  # metrics are exported every few seconds
    return None


def processor_seconds() -> dict[str, float]:
    """Processor time so far of HAProxy, Serve's own proxy, the ingress and the model's replica."""
    titles = {
        "haproxy": ("/haproxy",),
        "proxy": ("ProxyActor",),
        "ingress": (":ingress",),
        "replica": (f":{MODEL_NAME}",),
    }
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:
            continue
        for role, words in titles.items():
            if (title.startswith("ray::") or "haproxy" in title) and any(word in title for word in words):
                found[role] = found.get(role, 0.0) + times.user + times.system
    return found


def per_conversation(before: Mapping[str, float], count: int) -> dict[str, float]:
    """Milliseconds of processor time since then, of each process, by the number of conversations."""
    now = processor_seconds()
    return {role: round((seconds - before.get(role, 0.0)) / count * 1000, 2) for role, seconds in now.items()}


def replica_bytes() -> int:
    """The resident memory of the endpoint's processes, on Linux."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica" in (process / "cmdline").read_bytes():
                pages = (process / "statm").read_text("ascii").split()[1]
                total += int(pages) * os.sysconf("SC_PAGE_SIZE")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


@contextmanager
def endpoint(
    folder: Path,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    num_ingresses: int = 1,
    load: Load = ModelSpec.load,
) -> Iterator[str]:
    """The address of an endpoint with a replica, or one of each of `models`, names and options."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serve_app.app import application
    from serve_app.config import ServiceConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with connect(num_cpus=4):
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        named = {MODEL_NAME: {"max_wait_s": WAITED_S, "burst": 0}} if models is None else models
        options = [{"model": str(folder), "name": name, **each} for name, each in named.items()]
        config = ServiceConfig.model_validate({"models": options, "num_ingress_replicas": num_ingresses})
        serve.run(application(config, load=load), name="rayward", route_prefix="/", logging_config=quiet)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def conversations(count: int, num_words: int | None = None) -> list[list[dict[str, str]]]:
    """Conversations of different prompts, by default of many lengths, some 190 tokens on average."""
    chooser = random.Random(1234)

    def text() -> str:
        length = num_words or min(150, max(5, round(chooser.lognormvariate(3.1, 0.8))))
        return " ".join(chooser.choices(WORDS, k=length))

    return [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(count)]


def write_checkpoint(folder: Path, preset: str) -> None:
    """A checkpoint of a preset's shape with random weights, and the embedded model's tokenizer."""
    source = resolve("tiny", None)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if preset == "tiny":
        return
    hidden, layers, heads, kv_heads, intermediate = SHAPES[preset]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return drawn.half()

    head_dim = hidden // heads
    tensors = {
        "model.tok_embeddings.weight": drawn(config["vocab_size"], hidden) * hidden**0.5,
        "model.norm.weight": torch.ones(hidden).half(),
        "v_head.weight": drawn(1, hidden),
    }
    for layer in range(layers):
        tensors |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "attention_norm.weight": torch.ones(hidden).half(),
                "ffn_norm.weight": torch.ones(hidden).half(),
                "attention.wqkv.weight": drawn((heads + 2 * kv_heads) * head_dim, hidden),
                "attention.wo.weight": drawn(hidden, heads * head_dim),
                "feed_forward.w1.weight": drawn(intermediate, hidden),
                "feed_forward.w3.weight": drawn(intermediate, hidden),
                "feed_forward.w2.weight": drawn(hidden, intermediate),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors")


def _timed_after_pause(work: Callable[[], object]) -> float:
    time.sleep(PAUSE_S)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
