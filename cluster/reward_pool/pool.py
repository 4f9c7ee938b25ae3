"""RewardActorPool, the RLHF door: conversations, texts or a trainer's token ids in, one raw score each out.

    with RewardActorPool("internlm/internlm2-1_8b-reward", num_actors=2, num_gpus=0.5) as pool:
        rewards = pool.score(conversations)

A batch's path: `encoder.py` reads and tokenises it here, `batch.py` has it cut into parts, `dispatch.py` sends them,
and the actors of `actor.py` score them. `supervisor.py` holds the pool together; `connection.py` starts and joins it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import ray
from torch import Tensor

from cluster.connect import connect
from cluster.reward_pool.actor import tensor_of
from cluster.reward_pool.batch import score_answers, score_batch
from cluster.reward_pool.calls import blocking
from cluster.reward_pool.connection import PoolConnection, attached, cpus_of_actor, device_and_gpus, started
from cluster.reward_pool.encoder import Encoding, OnError, RewardEncoder, step_values, values_of
from cluster.reward_pool.errors import PoolClosedError, RewardInputError
from cluster.reward_pool.model_holder import WeightsVersion
from cluster.reward_pool.supervisor import MemberHealth, PoolPlan, Roster
from serve_app.reward_model import Conversation, ConversationLike, ModelSpec, ScoringError
from serve_app.reward_model.architecture import Quantization
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.scores import Aggregate
from serve_app.reward_model.spec import absolute
from serve_app.reward_model.steps import stepped_answers
from serve_app.reward_model.tokenizer import Truncation
from serve_app.reward_model.turn_list import TurnList


class RewardActorPool:
    """Reward actors as one object. Calls from several threads, event loops and processes are safe, and take turns.

    The scores are raw logits in float32, with the bits of `RewardModel.score` on the same kind of device. A pickled
    pool talks to the same actors. An actor that dies is replaced, and what it was scoring asked for again.

    Args:
        model: `"tiny"`, a local folder that every node sees, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        num_actors: copies of the model.
        device: `"auto"` is CUDA where the cluster has GPUs, else the CPU.
        dtype: as `RewardModel.from_pretrained` takes it, like `token_budget`, `prefix_cache_bytes` (for candidates and
            turns that come one by one) and `quantization`.
        num_gpus: GPUs of one actor, parts allowed; several, on one node, share the layers; by default 1 on CUDA.
        num_cpus: CPUs of one actor, and its threads on CPU; by default 1 on CUDA, and on CPU a share of half a node's.
        name: under which `attach` finds the pool from other jobs.
        detached: the pool lives until `shutdown`, not until this process ends; it needs a name then.
        policy_tokenizer: the policy's tokenizer, a folder, a Hugging Face id or the object itself: `forward` needs it,
            and `score_text` reads its template then.
        strip_thinking: leave `<think>` blocks of assistants' messages out.
        keep_default_system: keep the system prompt that the policy's chat template writes unasked.
        truncation: `"error"`, `"right"` or `"left"`: what is done with conversations over the limit.
        max_tokens: a limit below the model's own.
        strict: refuse what is scored with a warning in the log otherwise, as an unknown role: see `RewardModel.score`.
        chat_template: a Jinja template in place of the model's own, or the file of one: for models that have none.
        base_model: for an adapter, the folder or id of the model it changes, in place of the one it names.
        head: `"logit:ID"` scores with a vocabulary row's logit: see `RewardModel.from_pretrained`.
        normalize: normalise with the checkpoint's own mean and deviation.
        timeout_s: the longest that one part of a batch may take, its wait at the actor included.
        start_timeout_s: the longest that actors may take to start, and weights to be loaded.
        max_restarts: actors replaced within an hour, before the pool gives up.

    Raises:
        PoolStartError: the actors do not come up in time.
        CheckpointError: the model cannot be loaded, or its quantization needs other devices.
        PolicyTokenizerError: the policy's tokenizer cannot be read.
        RewardInputError: an argument makes no sense.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        revision: str | None = None,
        num_actors: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        token_budget: int | Literal["auto"] = "auto",
        prefix_cache_bytes: int | Literal["auto"] = 0,
        quantization: Quantization = "none",
        num_gpus: float | None = None,
        num_cpus: float | None = None,
        name: str | None = None,
        detached: bool = False,
        policy_tokenizer: Any = None,
        strip_thinking: bool = False,
        keep_default_system: bool = False,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
        chat_template: str | Path | None = None,
        base_model: str | None = None,
        head: str | None = None,
        normalize: bool = False,
        timeout_s: float = 600.0,
        start_timeout_s: float = 900.0,
        max_restarts: int = 10,
    ) -> None:
        if num_actors < 1 or timeout_s <= 0 or start_timeout_s <= 0 or max_restarts < 0:
            raise RewardInputError("num_actors, timeout_s and start_timeout_s are positive, max_restarts at least 0")
        if prefix_cache_bytes != "auto" and prefix_cache_bytes < 0:
            raise RewardInputError("prefix_cache_bytes is 'auto' or a number of bytes, 0 for none")
        if detached and name is None:
            raise RewardInputError("a detached pool needs a name, or nobody could find it again: name=...")
        spec = ModelSpec(
            absolute(model),
            revision,
            device,
            dtype,
            token_budget,
            quantization,
            chat_template=None if chat_template is None else template_text(chat_template),
            base_model=None if base_model is None else absolute(base_model),
            head=head,
            normalize=normalize,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        spec.check_device()
        encoding = Encoding(policy_tokenizer, truncation, max_tokens, strip_thinking, keep_default_system, strict)
        self._encoder: RewardEncoder | None = RewardEncoder(spec, encoding)
        self._encoder.check_policy()
        self._owns = not detached
        self._ray = contextlib.ExitStack()
        atexit.register(self._ray.close)  # for pools that nobody closes
        resources = self._ray.enter_context(connect(os.environ.get("RAY_ADDRESS")))
        try:
            device, num_gpus = device_and_gpus(device, num_gpus, resources)
            spec = replace(spec, device=device)
            spec.check_device()
            plan = PoolPlan(
                spec=spec,
                encoding=encoding,
                num_actors=num_actors,
                num_gpus=num_gpus,
                num_cpus=cpus_of_actor(num_cpus, device, num_actors, resources),
                timeout_s=timeout_s,
                start_timeout_s=start_timeout_s,
                max_restarts=max_restarts,
            )
            self._connection = started(plan, name=name, detached=detached)
        except BaseException:
            self._ray.close()
            raise

    @classmethod
    def attach(cls, name: str) -> RewardActorPool:
        """The running pool of that name, made by this job or, where it is detached, by any other of the cluster.

        Leaving it as a context leaves it running. Raises `PoolClosedError` where there is none.
        """
        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        stack.enter_context(connect(os.environ.get("RAY_ADDRESS")))
        try:
            return cls._of(attached(name), stack)
        except BaseException:
            stack.close()
            raise

    @classmethod
    def _of(cls, connection: PoolConnection, stack: contextlib.ExitStack | None = None) -> RewardActorPool:
        pool = cls.__new__(cls)
        pool._encoder = None
        pool._owns = False
        pool._ray = stack or contextlib.ExitStack()
        pool._connection = connection
        return pool

    def __reduce__(self) -> tuple[Any, ...]:
        connection = self._connection
        return _unpickled, (connection.supervisor, connection.plan, connection.roster)

    def score(self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise") -> list[float | None]:
        """The raw score of each conversation, in order; `[]` for none.

        Args:
            conversations: each a list of messages with a role and a content. Those with the same prompt are
                candidates: they are scored on one actor, the prompt once.
            on_error: `"null"` gives None for an item that cannot be scored, instead of raising its error.

        Raises:
            ScoringError: the first item that cannot be scored, its place in `index`.
            RewardInputError: this is no list of conversations.
            RewardPoolError: the pool sleeps or is gone, actors keep dying, or a bound of time is over.
        """
        return blocking(self.score_async(conversations, on_error=on_error))

    async def score_async(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[float | None]:
        """`score` on an event loop; cancelling it withdraws what the actors have not begun."""
        return values_of(await self._score(self._reader.conversations(conversations)), on_error)

    def score_turns(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[list[float] | None]:
        """The raw scores of each conversation after each message of the assistant, in order: what an environment of
        several turns gives for each. Each has the bits that `score` gives the conversation cut there.

        The arguments and errors are those of `score`; a conversation without a message of the assistant's, or with a
        turn that cannot be scored, is an item that cannot.
        """
        return blocking(self.score_turns_async(conversations, on_error=on_error))

    async def score_turns_async(
        self, conversations: Sequence[ConversationLike], *, on_error: OnError = "raise"
    ) -> list[list[float] | None]:
        """`score_turns` on an event loop."""
        turns = TurnList.of(self._reader.conversations(conversations))
        return values_of(turns.scored(await self._score(turns.flat)), on_error)

    def score_steps(
        self,
        conversations: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        aggregate: Aggregate | None = None,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """A process reward model's scores of answers in steps: for each answer a list with the score of each step.

        Args:
            conversations: the messages before each answer. What answers begin with alike is computed once: the branches
                of a search cost their new steps.
            steps: each answer's steps, in order.
            aggregate: one number for each answer in place of its list: the `"product"` of the scores, their
                `"minimum"` or the `"last"` one.
            on_error: as `score` has it.

        Raises:
            ScoringError: as `score`, and where the model scores no steps.
        """
        return blocking(self.score_steps_async(conversations, steps, aggregate=aggregate, on_error=on_error))

    async def score_steps_async(
        self,
        conversations: Sequence[ConversationLike],
        steps: Sequence[Sequence[str]],
        *,
        aggregate: Aggregate | None = None,
        on_error: OnError = "raise",
    ) -> list[Any]:
        """`score_steps` on an event loop."""
        answers = stepped_answers(conversations, steps)
        outcomes = await score_answers(answers, self._reader, self._connection)
        return step_values(outcomes, aggregate, on_error)

    def score_text(self, texts: Sequence[str], *, on_error: OnError = "raise") -> list[float | None]:
        """`score` for rendered texts: ChatML, the model's own chat template, or a declared policy's.

        Raises:
            RenderedTextError: a text is none of these; its place is in `index`.
        """
        return blocking(self.score_text_async(texts, on_error=on_error))

    async def score_text_async(self, texts: Sequence[str], *, on_error: OnError = "raise") -> list[float | None]:
        """`score_text` on an event loop."""
        return values_of(await self._score(await asyncio.to_thread(self._reader.texts, texts)), on_error)

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_lens: Sequence[int] | Tensor | None = None,
        pad_sequence: bool = False,
        *,
        on_error: OnError = "raise",
    ) -> Tensor:
        """The rewards of a policy's sequences, float32 [B] on the CPU. Shape legend: B sequences, T tokens.

        The ids are decoded with `policy_tokenizer`, the policy's template is taken off, and the conversation is
        rendered in the reward model's.

        Args:
            sequences: the policy's token ids, prompt and response: [B, T], or packed [T] or [1, T].
            attention_mask: like `sequences`, nonzero where a token counts; padding may be on either side and of any
                id. Without it every token counts.
            packed_seq_lens: the lengths of packed sequences.
            pad_sequence: whether a packed row has padding after the last one.
            on_error: `"null"` gives NaN for a sequence that cannot be scored.

        Raises:
            PolicyTokenizerError: no `policy_tokenizer` was declared.
            RewardInputError: shapes, lengths or dtypes do not fit.
            ScoringError: a sequence cannot be read or scored; its place is in `index`.
        """
        return blocking(self.forward_async(sequences, attention_mask, packed_seq_lens, pad_sequence, on_error=on_error))

    async def forward_async(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_lens: Sequence[int] | Tensor | None = None,
        pad_sequence: bool = False,
        *,
        on_error: OnError = "raise",
    ) -> Tensor:
        """`forward` on an event loop."""
        read = await asyncio.to_thread(
            self._reader.policy_ids, sequences, attention_mask, packed_seq_lens, pad_sequence
        )
        return tensor_of(values_of(await self._score(read), on_error))

    def health(self) -> list[MemberHealth]:
        """How each actor is: where it runs, what it scores with, what waits there, how often it was replaced."""
        return cast(list[MemberHealth], blocking(self._connection.ask_supervisor("health")))

    def sleep(self) -> None:
        """Finish what was begun and free the devices of the weights: on CUDA they go to the host, on CPU to nowhere.

        Scoring raises `AsleepError` until `wake`. All actors or none: else a `SleepError`.
        """
        self._control("sleep", steps=2)

    def wake(self) -> None:
        """Bring the weights back, from the host or their files; the scores have the same bits again.

        Raises:
            SleepError: an actor's device has not the memory, or the files changed; all actors sleep on.
        """
        self._control("wake", steps=2)

    def update_weights(self, path: str, *, revision: str | None = None) -> WeightsVersion:
        """Score with another checkpoint of the same architecture from now on: in all actors, or in none.

        What was begun is finished with the old weights; no batch has scores of both.

        Args:
            path: a folder that every node sees, or a Hugging Face id. Do not change its files afterwards: an actor
                that is replaced reads them again, and refuses others.

        Raises:
            WeightsUpdateError: an actor cannot take it; the message says which and why. The old weights stay.
        """
        return cast(WeightsVersion, self._control("update_weights", absolute(path), revision, steps=4))

    def shutdown(self) -> None:
        """End the actors, whoever made them, and leave Ray if this pool joined it. A second time it does nothing."""
        with contextlib.suppress(PoolClosedError):
            blocking(self._connection.ask_supervisor("stop"))
            ray.kill(self._connection.supervisor)
        self._connection.is_closed = True
        self._ray.close()

    def __enter__(self) -> RewardActorPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owns:
            self.shutdown()
        else:
            self._ray.close()

    @property
    def _reader(self) -> RewardEncoder:
        if self._encoder is None:
            plan = self._connection.plan
            self._encoder = RewardEncoder(plan.spec, plan.encoding)
        return self._encoder

    def _control(self, method: str, *args: Any, steps: int) -> Any:
        timeout_s = steps * self._connection.plan.start_timeout_s
        return blocking(self._connection.ask_supervisor(method, *args, timeout_s=timeout_s))

    async def _score(self, parsed: Sequence[Conversation | ScoringError]) -> list[float | ScoringError]:
        return await score_batch(parsed, self._reader, self._connection)


def _unpickled(supervisor: Any, plan: PoolPlan, roster: Roster) -> RewardActorPool:
    return RewardActorPool._of(PoolConnection(supervisor, plan, roster))
