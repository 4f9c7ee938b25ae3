"""A cluster of 4 nodes and 8 GPUs that is none: Ray's own nodes on this machine, and a decoder that sleeps.

A forward pass lasts as long as one of a 7B model on an H100: 2 x 7e9 floating-point operations a token (Kaplan et al.,
2020, arXiv:2001.08361, section 2.1) at 40 % of the 989 TFLOP/s that its data sheet gives for dense bfloat16, so
28,257 tokens a second. All else is real: tokenising, packing, batching, Ray Data, Ray Serve, HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.packing import num_rows
from serve_app.reward_model.prefixes import Branch

__all__ = ["NUM_GPUS", "TOKENS_PER_S", "SimulatedCluster", "expected_score", "simulated_cluster", "sleeping_model"]

NUM_NODES, GPUS_PER_NODE = 4, 2
NUM_GPUS = NUM_NODES * GPUS_PER_NODE
TOKENS_PER_S = 0.4 * 989e12 / (2 * 7e9)
TOKEN_BUDGET = 8192


class LastToken:
    """A head that reads one place, the last token."""

    def read_positions(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        return (len(token_ids) - 1,)


class SleepingDecoder:
    """Takes a 7B model's time; a sequence's score follows from its token ids alone."""

    rows_per_key = 0.0

    def __init__(self, config: DecoderConfig, tokens_per_s: float) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self.devices = (self.device,)
        self.dtype = torch.bfloat16
        self.head = LastToken()
        self.cached_pass = None
        self._tokens_per_s = tokens_per_s

    def score(self, sequences: Sequence[Sequence[int]], branches: Sequence[Branch], *, cache: None) -> Tensor:
        lengths = [len(sequence) for sequence in sequences]
        time.sleep(num_rows(branches, lengths) / self._tokens_per_s)
        scores = [expected_score(sequences[branch.sequence]) for branch in branches]
        return torch.tensor(scores)[:, None]

    def release_buffers(self) -> None:
        pass


def expected_score(token_ids: Sequence[int]) -> float:
    """The score of a sequence: exact in float32, and another for nearly every other sequence."""
    return sum(place * token for place, token in enumerate(token_ids, 1)) % 16_777_213 / 4096


def sleeping_model(*_: Any, tokens_per_s: float = TOKENS_PER_S) -> RewardModel:
    """A `RewardModel` around the decoder that sleeps, with the embedded model's tokenizer; as both doors load it."""
    folder = resolve("tiny", None)
    decoder: Any = SleepingDecoder(DecoderConfig.from_folder(folder), tokens_per_s)
    return RewardModel(decoder, folder, token_budget=TOKEN_BUDGET)


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """The cluster, and its nodes beside the head."""

    cluster: Any
    nodes: list[Any]

    def node_of(self, actor_class: str) -> Any:
        """A node that has an actor of a class. The head, which takes no work, has none of ours."""
        from ray._private.state import actors  # the public way needs Ray's dashboard

        found = (actor for actor in actors().values() if actor["ActorClassName"] == actor_class)
        hosts = {actor["Address"]["NodeID"] for actor in found if actor["State"] == "ALIVE"}
        return next(node for node in self.nodes if node.node_id in hosts)

    def kill(self, node: Any) -> None:
        """End a node's processes, as when a machine loses power."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)


@contextmanager
def simulated_cluster(*, num_nodes: int = NUM_NODES, gpus_per_node: int = GPUS_PER_NODE) -> Iterator[SimulatedCluster]:
    """Start the cluster and join it. This process must not be connected to Ray, nor be again."""
    from ray.cluster_utils import Cluster

    from cluster.connect import connect

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    try:
        add = partial(cluster.add_node, wait=False, num_cpus=4, num_gpus=gpus_per_node, object_store_memory=200_000_000)
        nodes = [add() for _ in range(num_nodes)]
        cluster.wait_for_nodes()
        with connect(cluster.address):
            yield SimulatedCluster(cluster, nodes)
    finally:
        cluster.shutdown()
