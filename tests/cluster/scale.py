"""What the scale tests and benchmark run, in a process of its own: jobs and the endpoint on a simulated cluster.

    python -m tests.cluster.scale --job-replicas 1 8 --endpoint-replicas 1 8 --seconds 20

Each door is driven with each number of replicas, and once more with all GPUs while a node is lost under it. What comes
out is held against what it must be: every row once and in order, every request answered, every score the one that its
tokens have. The last line is JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from jobs.score import ScoreConfig, run
from serve_app.config import ServiceConfig
from tests.benchmarks.commits import commit_rate
from tests.cluster.simulated import (
    NUM_GPUS,
    NUM_NODES,
    TOKENS_PER_S,
    SimulatedCluster,
    expected_score,
    simulated_cluster,
    sleeping_model,
)
from tests.conftest import chat

WORDS = ("the", "sea", "is", "wide", "while", "rivers", "run", "to", "it", "from", "hills", "since", "spring")
ROWS_PER_UNIT = 256
REQUEST_CONVERSATIONS = 16
REQUESTS_PER_CLIENT = 4
CLIENTS_PER_REPLICA = 3
WAIT_S = 240.0
POLL_S = 0.05


class ScaleConfig(BaseModel):
    """Drive both doors on a simulated cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_replicas: tuple[PositiveInt, ...] = (1, NUM_GPUS)
    """Numbers of scoring actors, which are measured in turn."""
    endpoint_replicas: tuple[PositiveInt, ...] = (1, NUM_GPUS)
    """Numbers of the endpoint's replicas."""
    nodes: PositiveInt = NUM_NODES
    """Nodes of the cluster, beside the head."""
    gpus_per_node: PositiveInt = NUM_GPUS // NUM_NODES
    """GPUs of each."""
    words: PositiveInt = 150
    """Words of a response; one is about 3.7 tokens of the embedded model's."""
    rows_per_replica: PositiveInt = 4000
    """Rows of the job's corpus, for each replica."""
    seconds: PositiveFloat = 20.0
    """How long the endpoint is under load, after a warm-up of a quarter of that."""


@dataclass(frozen=True, slots=True)
class Driven:
    """How a door did: tokens per second once it was in full swing, and that over what so many replicas can do."""

    replicas: int
    tokens_per_s: float
    of_linear: float
    conversations: int

    @classmethod
    def of(cls, replicas: int, tokens_per_s: float, conversations: int) -> Driven:
        linear = tokens_per_s / (replicas * TOKENS_PER_S)
        return cls(replicas, round(tokens_per_s), round(linear, 3), conversations)


def main() -> int:
    """Run; the exit status."""
    config = tyro.cli(ScaleConfig, description=__doc__, prog="python -m tests.cluster.scale")
    result: dict[str, Any] = {"assumed_tokens_per_s": round(TOKENS_PER_S)}
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated_cluster(num_nodes=config.nodes, gpus_per_node=config.gpus_per_node) as simulated,
    ):
        job = _Job(Path(folder), config)
        result["job"] = [asdict(job.drive(count)) for count in config.job_replicas]
        with endpoint() as service:
            result["endpoint"] = [asdict(service.drive(count, config)) for count in config.endpoint_replicas]
            result["endpoint_losing_a_node"] = asdict(service.drive_while_losing(simulated, config))
        gpus = len(simulated.nodes) * config.gpus_per_node
        result["job_losing_a_node"] = asdict(job.drive(gpus, lose=lambda: simulated.kill(simulated.nodes[-1])))
    print(json.dumps(result))
    return 0


def conversations(count: int, words: int, seed: int) -> list[list[dict[str, str]]]:
    """Made conversations with responses of `words` words. They begin differently: shared tokens would be read once."""
    chooser = random.Random(seed)
    return [
        chat(f"{chooser.getrandbits(64):x}, what of it?", " ".join(chooser.choices(WORDS, k=words)))
        for _ in range(count)
    ]


class _Job:
    """jobs.score over a made corpus, once for each call of `drive`."""

    def __init__(self, folder: Path, config: ScaleConfig) -> None:
        self._folder = folder
        self._config = config
        self._tokenizer = sleeping_model().tokenizer

    def drive(self, replicas: int, *, lose: Callable[[], None] | None = None) -> Driven:
        """Score with so many actors; `lose` is called once some units are committed."""
        place = self._folder / f"{replicas}{'-losing' if lose else ''}"
        asked = conversations(self._config.rows_per_replica * replicas, self._config.words, seed=replicas)
        _write(place / "in", asked)
        output = place / "out"
        watcher = threading.Thread(target=_after_parts, args=(output, 2 * replicas, lose)) if lose else None
        if watcher:
            watcher.start()
        options = {"input": str(place / "in"), "output": str(output), "rows_per_unit": ROWS_PER_UNIT}
        total = run(ScoreConfig.model_validate(options | {"num_actors": replicas}), load=sleeping_model)
        if watcher:
            watcher.join()
        assert (total.rows, total.errors) == (len(asked), 0), total
        scores = pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*")))
        assert scores["number"].to_pylist() == list(range(len(asked))), "rows are lost, repeated or out of order"
        expected = _expected(self._tokenizer, asked)
        assert scores["score"].to_pylist() == expected, "scores are not those of their rows"
        return Driven.of(replicas, commit_rate(output), len(asked))


def _write(folder: Path, asked: Sequence[Any], num_files: int = 8) -> None:
    folder.mkdir(parents=True)
    size = -(-len(asked) // num_files)
    for file in range(num_files):
        rows = range(file * size, min(len(asked), (file + 1) * size))
        table = pa.table({"number": list(rows), "messages": [asked[row] for row in rows]})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=ROWS_PER_UNIT)


def _expected(tokenizer: Any, asked: Sequence[Any]) -> list[float]:
    return [expected_score(item.token_ids) for item in tokenizer.encode_batch(asked)]


def _after_parts(output: Path, num_parts: int, act: Callable[[], None]) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(list(output.glob("part-*"))) < num_parts:
        assert time.monotonic() < deadline, "the job commits nothing"
        time.sleep(POLL_S)
    act()


class _Endpoint:
    """The endpoint on a free port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._tokenizer = sleeping_model().tokenizer

    def deploy(self, replicas: int) -> None:
        from ray import serve

        from serve_app.app import application

        model = {"model": "tiny", "num_gpus": 1, "num_cpus": 0.5, "num_replicas": replicas}
        serve.run(application(ServiceConfig.model_validate(model), load=sleeping_model), name="rayward")

    def drive(self, replicas: int, config: ScaleConfig, *, during: Callable[[], None] | None = None) -> Driven:
        """Load for so many replicas, for the seconds of `config`; `during` is called in the midst of it."""
        self.deploy(replicas)
        num_clients = CLIENTS_PER_REPLICA * replicas
        # Each client has conversations of its own: equal ones in a batch would be read once.
        asked = conversations(REQUEST_CONVERSATIONS * REQUESTS_PER_CLIENT * num_clients, config.words, seed=0)
        expected = _expected(self._tokenizer, asked)
        answered: list[tuple[float, int]] = []
        stop = threading.Event()

        def ask(client_number: int) -> None:
            with httpx.Client(base_url=self._url, timeout=WAIT_S) as client:
                for number in itertools.count():
                    if stop.is_set():
                        return
                    request = client_number * REQUESTS_PER_CLIENT + number % REQUESTS_PER_CLIENT
                    places = slice(request * REQUEST_CONVERSATIONS, (request + 1) * REQUEST_CONVERSATIONS)
                    response = client.post("/v1/score", json={"conversations": asked[places]})
                    assert response.status_code == 200, response.text  # no retries: the endpoint mends what it can
                    body = response.json()
                    assert [result["score"] for result in body["results"]] == expected[places]
                    answered.append((time.monotonic(), body["usage"]["prompt_tokens"]))

        with ThreadPoolExecutor(num_clients) as pool:
            clients = [pool.submit(ask, number) for number in range(num_clients)]
            try:
                time.sleep(config.seconds / 4)
                if during is not None:
                    during()
                started = time.monotonic()
                time.sleep(config.seconds)
                ended = time.monotonic()
            finally:
                stop.set()
            for client in clients:
                client.result()
        tokens = sum(count for at, count in answered if started <= at < ended)
        return Driven.of(replicas, tokens / (ended - started), REQUEST_CONVERSATIONS * len(answered))

    def drive_while_losing(self, simulated: SimulatedCluster, config: ScaleConfig) -> Driven:
        """Load while a node that has a replica and not the ingress is lost."""
        count = len(simulated.nodes) * config.gpus_per_node
        self.deploy(count)
        victim = simulated.node_of("ServeReplica:rayward:tiny", spare="ServeReplica:rayward:ingress")
        return self.drive(count, config, during=lambda: simulated.kill(victim))


@contextmanager
def endpoint() -> Iterator[_Endpoint]:
    """Serve on a free port of this machine."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    yield _Endpoint(port)
    serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
