"""A running Serve application as the model of a job: asked by the driver, driven from the workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from jobs.errors import ServedModelError
from jobs.options import ScoringOptions
from jobs.runs.placement import ActorPool, plan_forwarders
from jobs.scoring.replica_calls import Outcomes, ReplicaCalls, num_replicas
from jobs.scoring.score_memory import Recalled, ScoreMemory
from serve_app.batching.parts import conversation_order, cut
from serve_app.reward_model import Conversation, Score, ScoringError
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.scores import Outputs, StepScores
from serve_app.reward_model.spec import ModelFacts
from serve_app.reward_model.steps import StepEncoder, sequences_of, stepped_answers, with_scores
from serve_app.reward_model.tokenizer import EncodedConversation, Truncation

logger = logging.getLogger(__name__)

INGRESS = "ingress"
DESCRIBE_TIMEOUT_S = 900.0
"""For the answer of a model's replica, which is loaded first where the model sleeps."""
UNITS_AT_ONCE = 4
"""Units that one sending process has under way: while the last part of one is scored, those of others follow."""
ENCODED_AT_ONCE = 1024
"""Conversations that are encoded and cut into parts at once; those after them are encoded while replicas score."""
STEPPED_AT_ONCE = 256
"""Answers in steps that are encoded at once: each is as many sequences as it has steps."""
MAX_PART_TOKENS = 16384
"""A replica's batch takes in several parts; one of so many tokens keeps a large GPU busy by itself."""


class ServedModel:
    """Scores conversations with a served model. Calls from several threads share the replicas.

    Raises:
        CheckpointError: the model's configuration and tokenizer cannot be had here.
        ServedModelError: they are not those of the replicas.
    """

    def __init__(self, facts: ModelFacts, calls: ReplicaCalls) -> None:
        folder = resolve(facts.model, facts.revision, weights=False)
        if facts.spec.fingerprint_of(folder, weights=False) != facts.tokenizer_fingerprint:
            raise ServedModelError(
                f"configuration or tokenizer of {facts.model} on {os.uname().nodename} are not those of the replicas; "
                "serve it with a revision, or from a shared folder"
            )
        self._config, self._tokenizer = facts.spec.read(folder)
        self._attributes = self._config.head.attributes
        self._calls = calls
        self.processor = facts.processor
        self.memory: ScoreMemory | None = None
        self._part_tokens = min(facts.token_budget, MAX_PART_TOKENS)

    @property
    def processors(self) -> tuple[str, ...]:
        """The kinds of processors that the replicas have computed on so far, the first of them that of `describe`."""
        return (self.processor, *sorted(self._calls.processors - {self.processor}))

    def outcomes(
        self,
        conversations: Sequence[Conversation],
        *,
        truncation: Truncation,
        max_tokens: int | None,
        strict: bool = False,
    ) -> list[Score | ScoringError]:
        """The score of each conversation, in order, or the error that it alone has.

        Raises:
            ScorerError: the replicas make no progress, keep dying, or serve another model by now.
        """
        outcomes: dict[int, Score | ScoringError] = {}
        pending: list[tuple[dict[int, EncodedConversation], _Answers]] = []
        try:
            encode = partial(self._tokenizer.encode_batch, truncation=truncation, max_tokens=max_tokens, strict=strict)
            for encoded in self._encoded(conversations, encode, outcomes):
                pending.append((encoded, self._asked([item.token_ids for item in encoded.values()])))
            for encoded, answers in pending:
                for (place, item), outputs in zip(encoded.items(), answers.result(), strict=True):
                    outcomes[place] = item.scored(outputs, self._attributes)
        finally:
            for _, answers in pending:
                answers.cancel()
        return [outcomes[place] for place in range(len(conversations))]

    def step_outcomes(
        self,
        conversations: Sequence[Conversation],
        steps: Sequence[Sequence[str]],
        *,
        max_tokens: int | None,
        strict: bool = False,
    ) -> list[StepScores | ScoringError]:
        """The scores of each answer's steps, in order, or the error that it alone has. Raises as `outcomes`."""
        encoder = StepEncoder.of(self._config, self._tokenizer)
        answers = stepped_answers(conversations, steps)
        outcomes: list[StepScores | ScoringError] = []
        for first in range(0, len(answers), STEPPED_AT_ONCE):
            own = answers[first : first + STEPPED_AT_ONCE]
            encoded = encoder.encode_batch(own, max_tokens=max_tokens, strict=strict)
            outcomes += with_scores(encoded, self._scores(sequences_of(encoded)))
        return outcomes

    def _scores(self, ids: Sequence[list[int]]) -> list[float | ScoringError]:
        """The score of each sequence, in order."""
        answers = self._asked(ids)
        try:
            return [one if isinstance(one, ScoringError) else one[0] for one in answers.result()]
        finally:
            answers.cancel()

    def _asked(self, ids: Sequence[list[int]]) -> _Answers:
        """What the replicas are asked for of the sequences: for all that the memory does not know, in parts."""
        recalled = None if self.memory is None else self.memory.recall(ids)
        missing = list(range(len(ids))) if recalled is None else recalled.missing
        parts = cut([ids[at] for at in missing], max_tokens=self._part_tokens)
        places = [[missing[at] for at in part] for part in parts]
        answers = [self._calls.submit([ids[at] for at in part]) for part in places]
        return _Answers(places, answers, recalled, self)

    def _encoded(
        self,
        conversations: Sequence[Conversation],
        encode: Callable[[Sequence[Conversation]], list[EncodedConversation | ScoringError]],
        failed: dict[int, Score | ScoringError],
    ) -> Iterator[dict[int, EncodedConversation]]:
        """Encoded conversations by their places, so many at once; what cannot be encoded goes to `failed`."""
        order = conversation_order(conversations)
        for first in range(0, len(order), ENCODED_AT_ONCE):
            places = order[first : first + ENCODED_AT_ONCE]
            found = encode([conversations[place] for place in places])
            encoded: dict[int, EncodedConversation] = {}
            for place, item in zip(places, found, strict=True):
                if isinstance(item, EncodedConversation):
                    encoded[place] = item
                else:
                    failed[place] = item
            yield encoded


@dataclass(frozen=True, slots=True)
class _Answers:
    """What replicas were asked for: the places of the sequences of each part, its answer to come, and what was known
    of the others. Once replicas on several kinds of processors answer, no score is remembered: it may be of any."""

    places: list[list[int]]
    answers: list[Future[Outcomes]]
    recalled: Recalled | None
    model: ServedModel

    def result(self) -> Outcomes:
        """The outcome of each sequence, in order."""
        found: dict[int, Outputs | ScoringError] = {}
        for part, answer in zip(self.places, self.answers, strict=True):
            found |= zip(part, answer.result(), strict=True)
        computed = [found[at] for at in sorted(found)]
        if self.recalled is None:
            return computed
        return self.recalled.completed(computed, remember=len(self.model.processors) == 1)

    def cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()


@dataclass(frozen=True, slots=True)
class ServedModelSource:
    """A deployment of reward models, and the facts its replicas gave of themselves when the job began.

    Replicas refuse a job that holds the key of other facts.
    """

    app: str
    deployment: str
    facts: ModelFacts
    pool: ActorPool

    @classmethod
    def of(cls, options: ScoringOptions) -> ServedModelSource:
        """The model behind `options.via_serve` on the connected Ray, held against what `options` say of it.

        Raises:
            ServedModelError: there is no such application, several models to choose from, no answer, or another model.
            ResourceError: the cluster has no CPUs left for the processes that send.
        """
        import ray

        app, deployment = _deployment(options)
        facts = _described(app, deployment)
        _check(options, facts, app)
        pool = plan_forwarders(
            ray.available_resources().get("CPU", 0.0),
            num_replicas=num_replicas(app, deployment),
            num_actors=options.num_actors,
            cpus_per_actor=options.cpus_per_actor,
        )
        return cls(app, deployment, facts, pool)

    def load(self) -> ServedModel:
        """The sender of conversations to the replicas, on this worker."""
        calls = ReplicaCalls(self.app, self.deployment, self.facts.key, num_callers=self.pool.num_actors)
        return ServedModel(self.facts, calls)

    @property
    def record(self) -> dict[str, Any]:
        """For the manifest."""
        named = {"app": self.app, "deployment": self.deployment, "model": self.facts.model, "key": self.facts.key}
        return {"via_serve": named}


def _deployment(options: ScoringOptions) -> tuple[str, str]:
    """The application and the deployment of `--via-serve APP` or `APP/MODEL`."""
    from ray import serve

    app, _, wanted = str(options.via_serve).partition("/")
    apps = serve.status().applications
    if app not in apps:
        running = f"these run: {', '.join(apps)}" if apps else "none runs there"
        raise ServedModelError(f"--via-serve {app}: no such Serve application; {running} (--address names the cluster)")
    models = [name for name in apps[app].deployments if name != INGRESS]
    if not wanted and len(models) > 1 and options.model is not None:
        wanted = PurePath(options.model).name
    chosen = [name for name in models if name == wanted] if wanted else models
    if len(chosen) != 1:
        raise ServedModelError(f"--via-serve {app}: say which model, as in {app}/{models[0]}, of {', '.join(models)}")
    return app, chosen[0]


def _described(app: str, deployment: str) -> ModelFacts:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not num_replicas(app, deployment):
        logger.info("no replica of %s runs; waiting for one", deployment)
    try:
        response = serve.get_deployment_handle(deployment, app).describe.remote()
        facts: ModelFacts = response.result(timeout_s=DESCRIBE_TIMEOUT_S)
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ServedModelError(f"--via-serve {app}: {deployment} does not say what it is: {last}") from error
    return facts


def _check(options: ScoringOptions, facts: ModelFacts, app: str) -> None:
    """Hold the facts against what the options say of the model."""
    said: dict[str, str] = {"device": options.device, "dtype": options.dtype}
    if options.quantization is not None:
        said["quantization"] = options.quantization
    differing = [
        f"{name} {found}, not {value}"
        for name, value in said.items()
        if value not in ("auto", found := getattr(facts, name))
    ]
    if options.model is not None:
        ours = facts.spec.fingerprint_of(resolve(options.model, options.revision))
        if ours != facts.fingerprint:
            differing.append(f"{facts.model} with fingerprint {facts.fingerprint}, not {options.model} with {ours}")
    if differing:
        raise ServedModelError(
            f"--via-serve {app} serves {'; '.join(differing)}; leave the option out to take it as it is"
        )
