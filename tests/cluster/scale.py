"""What the scale tests and benchmark run, in a process of its own: jobs and the endpoint on a simulated cluster.

    python -m tests.cluster.scale --job-replicas 1 8 --endpoint-replicas 1 8 --seconds 20

Each door is driven with each number of replicas, and once more with all GPUs while a node is lost under it. With
`--rising-from 0 1` replicas of the endpoint follow a load that comes and goes, from so few to four and back. What comes
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from jobs.score import ScoreConfig, run
from jobs.scoring.replica_calls import num_replicas
from serve_app.client import RewardClient
from serve_app.config import ServiceConfig
from serve_app.web.proxy import PROXY_ENVIRONMENT
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
REQUEST_CONVERSATIONS = 16
REQUESTS_PER_CLIENT = 4
CLIENTS_PER_REPLICA = 3
MOST_FOLLOWING = 4
WAIT_S = 240.0
FOLLOWING_S = 480.0  # two minutes without work to one replica, and two more to none
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
    rows_per_unit: PositiveInt = 256
    """Rows that the job commits at once."""
    seconds: PositiveFloat = 20.0
    """How long the endpoint is under load, after a warm-up of a quarter of that."""
    rising_from: tuple[NonNegativeInt, ...] = ()
    """Fewest replicas of an endpoint whose number follows the load, which are measured in turn: three
    to six minutes each, and nothing else is then."""


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


@dataclass(frozen=True, slots=True)
class Followed:
    """How replicas followed a load: seconds from its start to the first answer and to the most replicas, and from its
    end to the fewest ones."""

    fewest: int
    most: int
    first_answer_s: float
    risen_s: float
    fallen_s: float
    conversations: int


def main() -> int:
    """Run; the exit status."""
    config = tyro.cli(ScaleConfig, description=__doc__, prog="python -m tests.cluster.scale")
    result: dict[str, Any] = {"assumed_tokens_per_s": round(TOKENS_PER_S)}
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated_cluster(num_nodes=config.nodes, gpus_per_node=config.gpus_per_node) as simulated,
    ):
        if config.rising_from:
            with endpoint() as service:
                result["rising"] = [asdict(service.rise_and_fall(fewest, config)) for fewest in config.rising_from]
            print(json.dumps(result))
            return 0
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
        """Score with so many actors; `lose` is called once a unit is committed."""
        place = self._folder / f"{replicas}{'-losing' if lose else ''}"
        asked = conversations(self._config.rows_per_replica * replicas, self._config.words, seed=replicas)
        _write(place / "in", asked, row_group_size=self._config.rows_per_unit)
        output = place / "out"
        options = {"input": str(place / "in"), "output": str(output), "model": "tiny", "remember_scores": False}
        options |= {"rows_per_unit": self._config.rows_per_unit}
        with ThreadPoolExecutor(1) as pool:
            watcher = pool.submit(_at_first_part, output, lose, len(asked)) if lose else None
            total = run(ScoreConfig.model_validate(options | {"num_actors": replicas}), load=sleeping_model)
            if watcher:
                watcher.result()
        assert (total.rows, total.errors) == (len(asked), 0), total
        scores = pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*")))
        assert scores["number"].to_pylist() == list(range(len(asked))), "rows are lost, repeated or out of order"
        expected = _expected(self._tokenizer, asked)
        assert scores["score"].to_pylist() == expected, "scores are not those of their rows"
        return Driven.of(replicas, commit_rate(output), len(asked))


def _write(folder: Path, asked: Sequence[Any], *, row_group_size: int, num_files: int = 8) -> None:
    folder.mkdir(parents=True)
    size = -(-len(asked) // num_files)
    for file in range(num_files):
        rows = range(file * size, min(len(asked), (file + 1) * size))
        table = pa.table({"number": list(rows), "messages": [asked[row] for row in rows]})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=row_group_size)


def _expected(tokenizer: Any, asked: Sequence[Any]) -> list[float]:
    return [expected_score(item.token_ids) for item in tokenizer.encode_batch(asked)]


def _at_first_part(output: Path, act: Callable[[], None], num_rows: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while not list(output.glob("part-*")):
        assert time.monotonic() < deadline, "the job commits nothing"
        time.sleep(POLL_S)
    act()
    done = sum(pq.read_metadata(part).num_rows for part in output.glob("part-*"))
    assert done < num_rows, "the job was done before the node was lost"


class _Endpoint:
    """The endpoint on a free port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._tokenizer = sleeping_model().tokenizer

    def deploy(self, **replicas: int) -> None:
        """Serve the model with so many replicas, as `ModelConfig` says it."""
        from ray import serve

        from serve_app.app import application

        model = {"model": "tiny", "num_gpus": 1, "num_cpus": 0.5, **replicas}
        serve.run(application(ServiceConfig.model_validate(model), load=sleeping_model), name="rayward")

    def drive(self, replicas: int, config: ScaleConfig) -> Driven:
        """Load for so many replicas, for the seconds of `config`."""
        self.deploy(num_replicas=replicas)
        with self._load([by_http] * (CLIENTS_PER_REPLICA * replicas), config) as load:
            time.sleep(config.seconds / 4)
            started = time.monotonic()
            time.sleep(config.seconds)
            return load.driven(replicas, started, time.monotonic())

    def drive_while_losing(self, simulated: SimulatedCluster, config: ScaleConfig) -> Driven:
        """Load from clients of both kinds while a node is lost that has an ingress, with their requests inside.

        All of them get all their scores.
        """
        replicas = len(simulated.nodes) * config.gpus_per_node
        self.deploy(num_replicas=replicas)
        kinds = [by_http, by_client] * -(-CLIENTS_PER_REPLICA * replicas // 2)
        with self._load(kinds, config) as load:
            load.wait_for_answers(2)
            started = time.monotonic()
            simulated.kill(simulated.node_of("ServeReplica:rayward:ingress"))
            load.wait_for_answers(3)  # the one each client waited for, and two more
            return load.driven(replicas, started, time.monotonic())

    def rise_and_fall(self, fewest: int, config: ScaleConfig) -> Followed:
        """Load from clients of both kinds that begins and ends, and the number of replicas that follows it.

        All of them get all their scores.
        """
        self.deploy(min_replicas=fewest, max_replicas=MOST_FOLLOWING)
        _wait_for_replicas(fewest)
        with self._load([by_http, by_client] * CLIENTS_PER_REPLICA * MOST_FOLLOWING, config) as load:
            began = time.monotonic()
            load.wait_for_answers(1)
            answered = load.first_answer_at
            _wait_for_replicas(MOST_FOLLOWING)
            risen = time.monotonic()
            load.wait_for_answers(3)
        ended = time.monotonic()
        _wait_for_replicas(fewest)
        return Followed(
            fewest,
            MOST_FOLLOWING,
            first_answer_s=round(answered - began, 1),
            risen_s=round(risen - began, 1),
            fallen_s=round(time.monotonic() - ended, 1),
            conversations=load.driven(MOST_FOLLOWING, began, ended).conversations,
        )

    @contextmanager
    def _load(self, kinds: Sequence[Asking], config: ScaleConfig) -> Iterator[_Load]:
        """Clients of these kinds ask over and over while the block runs; an error of one is raised after it."""
        asked = conversations(REQUEST_CONVERSATIONS * REQUESTS_PER_CLIENT * len(kinds), config.words, seed=0)
        load = _Load(self._url, asked, _expected(self._tokenizer, asked), num_clients=len(kinds))
        with ThreadPoolExecutor(len(kinds)) as pool:
            load.clients = [pool.submit(load.ask, number, asking) for number, asking in enumerate(kinds)]
            try:
                yield load
            finally:
                load.stop.set()
            for client in load.clients:
                client.result()


def _wait_for_replicas(count: int) -> None:
    deadline = time.monotonic() + FOLLOWING_S
    while num_replicas("rayward", "tiny") != count:
        assert time.monotonic() < deadline, f"there are {num_replicas('rayward', 'tiny')} replicas, not {count}"
        time.sleep(POLL_S)


Asking: TypeAlias = Callable[[str], AbstractContextManager[Callable[[Sequence[Any]], tuple[list[float], int]]]]
"""A kind of client: with the endpoint's address, what takes conversations to their scores and their tokens in all."""


@contextmanager
def by_http(url: str) -> Iterator[Callable[[Sequence[Any]], tuple[list[float], int]]]:
    """Plain HTTP without retries."""
    with httpx.Client(base_url=url, timeout=WAIT_S) as client:

        def score(asked: Sequence[Any]) -> tuple[list[float], int]:
            response = client.post("/v1/score", json={"conversations": asked})
            assert response.status_code == 200, f"{response.status_code}: {response.text}"
            body = response.json()
            return [result["score"] for result in body["results"]], body["usage"]["prompt_tokens"]

        yield score


@contextmanager
def by_client(url: str) -> Iterator[Callable[[Sequence[Any]], tuple[list[float], int]]]:
    """`RewardClient` as it comes."""
    with RewardClient(url) as client:

        def score(asked: Sequence[Any]) -> tuple[list[float], int]:
            scores = client.score(asked)
            return [score.value for score in scores], sum(score.num_tokens for score in scores)

        yield score


class _Load:
    """What clients asked and got. Each has conversations of its own: equal ones in a batch would be read once."""

    def __init__(self, url: str, asked: list[Any], expected: list[float], *, num_clients: int) -> None:
        self.stop = threading.Event()
        self.clients: list[Future[None]] = []
        self._url = url
        self._asked = asked
        self._expected = expected
        self._answered: list[list[tuple[float, int]]] = [[] for _ in range(num_clients)]

    def ask(self, client: int, asking: Asking) -> None:
        """Ask until `stop`; every answer is held against what it must be."""
        with asking(self._url) as score:
            for number in itertools.count():
                if self.stop.is_set():
                    return
                request = client * REQUESTS_PER_CLIENT + number % REQUESTS_PER_CLIENT
                places = slice(request * REQUEST_CONVERSATIONS, (request + 1) * REQUEST_CONVERSATIONS)
                scores, tokens = score(self._asked[places])
                assert scores == self._expected[places], "scores are not those of their conversations"
                self._answered[client].append((time.monotonic(), tokens))

    def wait_for_answers(self, count: int) -> None:
        """Until each client has got so many more; a client that failed is an error at once."""
        wanted = [len(answers) + count for answers in self._answered]
        deadline = time.monotonic() + WAIT_S
        while any(len(answers) < goal for answers, goal in zip(self._answered, wanted, strict=True)):
            for client in self.clients:
                if client.done():
                    client.result()
            assert time.monotonic() < deadline, "clients wait for ever"
            time.sleep(POLL_S)

    @property
    def first_answer_at(self) -> float:
        """When the first answer to any client came."""
        return min(answers[0][0] for answers in self._answered if answers)

    def driven(self, replicas: int, started: float, ended: float) -> Driven:
        """The pace between two times; the conversations are those of the whole load."""
        answers = list(itertools.chain.from_iterable(self._answered))
        tokens = sum(count for at, count in answers if started <= at < ended)
        return Driven.of(replicas, tokens / (ended - started), REQUEST_CONVERSATIONS * len(answers))


@contextmanager
def endpoint() -> Iterator[_Endpoint]:
    """Serve on a free port of this machine."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        proxy_location="HeadOnly",
        controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
    )
    yield _Endpoint(port)
    serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
