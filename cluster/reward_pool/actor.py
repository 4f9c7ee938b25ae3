"""RewardActor: a reward model in a Ray actor, scoring what concurrent callers send in batches of its own.

    from cluster.reward_pool.actor import launch
    from serve_app.reward_model import ModelSpec
    actor = launch(num_gpus=0.25, name="reward")
    ray.get(actor.open.remote(ModelSpec("internlm/internlm2-1_8b-reward")))
    ray.get(actor.score.remote(conversations))

A `RewardActorPool` is several of them behind one object, with restarts and retries.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from cluster.connect import gpus_of_actor
from cluster.reward_pool.calls import SharedLock
from cluster.reward_pool.encoder import Encoding, OnError, RewardEncoder, step_values, values_of
from cluster.reward_pool.errors import RewardInputError, RewardPoolError
from cluster.reward_pool.model_holder import ModelSlot, WeightsVersion
from serve_app.batching.admission import Admission
from serve_app.batching.batcher import TokenBatcher
from serve_app.batching.wire import ScoreReply, TokenBatch
from serve_app.reward_model import Conversation, ConversationLike, ModelSpec, ScoringError
from serve_app.reward_model.scores import Aggregate, Outputs
from serve_app.reward_model.spec import dtype_name
from serve_app.reward_model.steps import sequences_of, stepped_answers, with_scores
from serve_app.reward_model.tokenizer import EncodedConversation
from serve_app.reward_model.turn_list import TurnList

T = TypeVar("T")

STALL_AFTER_S = 300.0
# Callers hold few parts in flight each; this bounds what thousands of them may queue up, in tokens.
MAX_QUEUED_TOKENS = 1 << 23
CALLS_AT_ONCE = 10_000
NAMESPACE = "rayward"
"""Ray's namespace of named actors: the same in every job, so that one finds what another left running."""


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """One actor: where it runs, what it scores with, and what waits. `queued_tokens` includes those being scored;
    `cached_tokens` were read from the prefix cache since its weights were loaded.
    """

    node: str
    pid: int
    device: str
    dtype: str
    weights: WeightsVersion
    is_asleep: bool
    token_budget: int
    queued_tokens: int
    cached_tokens: int = 0


class RewardActor:
    """The class of the Ray actor. All that PyTorch does in it happens in one thread.

    `num_threads` is for models on CPU: by default the CPUs that Ray set aside for the actor, at least one. The
    constructor takes no model: `open` loads it, so that what goes wrong then reaches the caller as it was raised.
    """

    def __init__(self, *, num_threads: int | None = None) -> None:
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._lock = SharedLock()
        self._slot = ModelSlot(ModelSpec())
        self._batcher: TokenBatcher[Outputs] | None = None
        self._encoding = Encoding()
        self._encoder: RewardEncoder | None = None
        self._encoder_lock = asyncio.Lock()
        self._about_model = ("", "", 0)

    async def open(
        self,
        spec: ModelSpec,
        encoding: Encoding | None = None,
        *,
        version: WeightsVersion | None = None,
        asleep: bool = False,
    ) -> ActorStatus:
        """Load a model; `version` and `asleep` are those of the pool that a restarted actor joins.

        Raises:
            CheckpointError: it cannot be loaded.
            PolicyTokenizerError: the encoding declares a policy's tokenizer that cannot be read.
            RewardPoolError: the files are not those of the version.
        """
        async with self._lock.alone():
            self._encoding = encoding or Encoding()
            self._encoder = None
            self._batcher = None
            self._slot = ModelSlot(spec.on_gpus(gpus_of_actor()))
            await self._in_thread(lambda: self._open(version, asleep))
            if self._encoding.policy_tokenizer is not None:
                await asyncio.to_thread((await self._opened_encoder()).check_policy)
            return self._status()

    def _open(self, version: WeightsVersion | None, asleep: bool) -> None:
        torch.set_num_threads(self._num_threads or _cpus_of_actor())
        self._slot.open(version, asleep=asleep)
        self._note_model()

    async def score(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """The raw score of each conversation, in order.

        Raises:
            ScoringError: the first that cannot be scored, its place in `index`; with `on_error="null"` its score is
                None instead.
            AsleepError: the weights are put away.
        """
        encoder = await self._opened_encoder()
        return values_of(await self._score(encoder.conversations(conversations)), on_error)

    async def score_turns(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[list[float] | None]:
        """The raw scores of each conversation after each message of the assistant: see `RewardActorPool.score_turns`.

        Raises:
            ScoringError: as `score`.
            AsleepError: the weights are put away.
        """
        encoder = await self._opened_encoder()
        turns = TurnList.of(encoder.conversations(conversations))
        return values_of(turns.scored(await self._score(turns.flat)), on_error)

    async def score_steps(
        self,
        conversations: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        aggregate: Aggregate | None = None,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """A process reward model's scores of each answer's steps: see `RewardActorPool.score_steps`.

        Raises:
            ScoringError: as `score`, and where the model scores no steps.
            AsleepError: the weights are put away.
        """
        encoder = await self._opened_encoder()
        encoded = await asyncio.to_thread(encoder.encode_steps, stepped_answers(conversations, steps))
        reply = await self._score_lists(sequences_of(encoded))
        return step_values(with_scores(encoded, reply.outcomes()), aggregate, on_error)

    async def score_text(self, texts: Sequence[str], *, on_error: OnError = "raise") -> list[float | None]:
        """The same for rendered texts: ChatML, the model's own chat template or a declared policy's."""
        encoder = await self._opened_encoder()
        return values_of(await self._score(await asyncio.to_thread(encoder.texts, texts)), on_error)

    async def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_lens: Sequence[int] | Tensor | None = None,
        pad_sequence: bool = False,
        *,
        on_error: OnError = "raise",
    ) -> Tensor:
        """The rewards of a policy's sequences, float32 [B] on the CPU: see `RewardActorPool.forward`."""
        encoder = await self._opened_encoder()
        read = await asyncio.to_thread(encoder.policy_ids, sequences, attention_mask, packed_seq_lens, pad_sequence)
        return tensor_of(values_of(await self._score(read), on_error))

    async def execute_batch(
        self, method_name: str, all_data: dict[str, Sequence[Any]], start_idx: int, end_idx: int
    ) -> list[Any]:
        """Call a method once for each of items `start_idx` to `end_idx` - 1; the results in order.

        As OpenRLHF's launcher calls its actors: `all_data` has a list for each argument, all of one length. The calls
        of a batch run at the same time, and what waits is scored together.

        Raises:
            RewardInputError: the lists differ in length, or there is no such method.
        """
        lengths = {name: len(values) for name, values in all_data.items()}
        if len(set(lengths.values())) > 1:
            raise RewardInputError(f"execute_batch: the arguments differ in length: {lengths}")
        method = None if method_name.startswith("_") else getattr(self, method_name, None)
        if not callable(method):
            raise RewardInputError(f"execute_batch: a reward actor has no method {method_name!r}")
        places = range(*slice(start_idx, end_idx).indices(next(iter(lengths.values()), 0)))
        calls = [method(**{name: values[place] for name, values in all_data.items()}) for place in places]
        if calls and not asyncio.iscoroutine(calls[0]):
            return calls
        return list(await asyncio.gather(*calls))

    async def empty_cache(self) -> None:
        """Give the device's memory back that is kept between calls."""
        async with self._lock.alone():
            await self._in_thread(self._slot.empty_cache)

    async def score_tokens(self, batch: TokenBatch, first: int, stop: int) -> ScoreReply:
        """The scores of sequences `first` to `stop` - 1 of a batch: what a pool sends.

        Raises:
            RaywardError: the actor sleeps, has too much to do, or its device failed.
        """
        return await self._score_lists(batch.lists(first, stop))

    async def status(self) -> ActorStatus:
        """Answers while a batch runs. Raises `BatcherStalledError` where the device makes no progress."""
        if self._batcher is not None:
            self._batcher.check_health()
        return self._status()

    async def sleep(self) -> None:
        """Finish what was begun, and put the weights away. Raises `SleepError` where that fails."""
        async with self._lock.alone():
            await self._in_thread(self._slot.sleep)

    async def wake(self) -> None:
        """Bring the weights back. Raises `SleepError` where that fails."""
        async with self._lock.alone():
            await self._in_thread(self._wake)

    def _wake(self) -> None:
        self._slot.wake()
        self._note_model()

    async def stage_weights(self, model: str, revision: str | None = None) -> str:
        """Read new weights into host memory and check them; their fingerprint. The first of three steps.

        Raises:
            RaywardError: they cannot be read, are of another model, or this one sleeps.
        """
        async with self._lock.alone():
            return await self._in_thread(lambda: self._slot.stage(model, revision))

    async def commit_weights(self, version: WeightsVersion) -> None:
        """Score with the staged weights. Raises `WeightsUpdateError` where that fails."""
        async with self._lock.alone():
            await self._in_thread(lambda: self._slot.commit(version))

    async def roll_back_weights(self) -> None:
        """Score with the weights before the update again."""
        async with self._lock.alone():
            await self._in_thread(self._slot.roll_back)

    async def finish_weights(self) -> None:
        """Let the weights before the update go."""
        async with self._lock.alone():
            await self._in_thread(self._slot.finish)

    async def _score(self, parsed: Sequence[Conversation | ScoringError]) -> list[float | ScoringError]:
        """The outcome of each conversation, in order; what could not be read keeps its error."""
        encoder = await self._opened_encoder()
        encoded = await asyncio.to_thread(encoder.encode, parsed)
        reply = await self._score_lists([item.token_ids for item in encoded if isinstance(item, EncodedConversation)])
        outcomes = iter(reply.outcomes())
        return [next(outcomes) if isinstance(item, EncodedConversation) else item for item in encoded]

    async def _score_lists(self, sequences: list[list[int]]) -> ScoreReply:
        async with self._lock.shared():
            model = self._slot.model
            if self._batcher is None:
                self._batcher = TokenBatcher(
                    lambda lists: self._slot.outputs(lists),
                    token_budget=model.scorer.token_budget,
                    admission=Admission(max_queued_tokens=MAX_QUEUED_TOKENS),
                    stall_after_s=STALL_AFTER_S,
                    executor=self._executor,
                )
            outcomes = await self._batcher.submit(sequences)
            return ScoreReply.of(outcomes, weights_version=self._slot.version.number)

    async def _opened_encoder(self) -> RewardEncoder:
        self._slot.version  # noqa: B018  # an error where there is no model yet
        async with self._encoder_lock:  # the first of many calls reads it
            if self._encoder is None:
                self._encoder = await asyncio.to_thread(RewardEncoder, self._slot.named, self._encoding)
            return self._encoder

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _note_model(self) -> None:
        if not self._slot.is_asleep:
            model = self._slot.model
            self._about_model = (str(model.device), dtype_name(model.dtype), model.scorer.token_budget)

    def _status(self) -> ActorStatus:
        device, dtype, token_budget = self._about_model
        batcher = self._batcher
        return ActorStatus(
            node=socket.gethostname(),
            pid=os.getpid(),
            device=device,
            dtype=dtype,
            weights=self._slot.version,
            is_asleep=self._slot.is_asleep,
            token_budget=token_budget,
            queued_tokens=0 if batcher is None else batcher.queued_tokens + batcher.running_tokens,
            cached_tokens=self._slot.cached_tokens,
        )


def launch(
    *,
    num_gpus: float = 0.0,
    num_cpus: float = 1.0,
    num_threads: int | None = None,
    name: str | None = None,
    detached: bool = False,
) -> Any:
    """Start the process of a `RewardActor`, without a model yet; its handle.

    Args:
        num_gpus: GPUs that Ray sets aside for it, parts allowed; over several the model's layers are spread.
        num_cpus: CPUs that Ray sets aside for it.
        num_threads: see `RewardActor`.
        name: under which others find it: `ray.get_actor(name, namespace="rayward")`.
        detached: it lives until it is killed, not until its maker ends; it needs a name then.

    Raises:
        RewardPoolError: it is to be detached and has no name, or the name is taken.
    """
    if detached and name is None:
        raise RewardPoolError("a detached actor needs a name, or nobody could find it again")
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_concurrency": CALLS_AT_ONCE}
    if name is not None:
        options |= {"name": name, "namespace": NAMESPACE}
    if detached:
        options["lifetime"] = "detached"
    try:
        return ray.remote(RewardActor).options(**options).remote(num_threads=num_threads)
    except ValueError as error:
        raise RewardPoolError(f"an actor {name!r} cannot be started: {error}") from error


def tensor_of(values: Sequence[float | None]) -> Tensor:
    """Rewards as float32 [B]; what has none is NaN."""
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)


def _cpus_of_actor() -> int:
    resources = ray.get_runtime_context().get_assigned_resources() if ray.is_initialized() else {}
    return max(1, int(resources.get("CPU", 1)))
