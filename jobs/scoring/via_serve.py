"""A running Serve application as the model of a job: asked by the driver, driven from the workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from jobs.errors import ServedModelError
from jobs.options import ScoringOptions
from jobs.runs.placement import ActorPool, plan_forwarders
from jobs.scoring.replica_calls import ReplicaCalls, num_replicas
from serve_app.reward_model import Conversation, Score, ScoringError
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.checkpoint import fingerprint, resolve
from serve_app.reward_model.model import DTYPES
from serve_app.reward_model.prefixes import together
from serve_app.reward_model.tokenizer import EncodedConversation, Tokenizer, Truncation

__all__ = ["UNITS_AT_ONCE", "ServedModel", "ServedModelSource"]

ENCODED_AT_ONCE = 256
# A replica's batch takes in several parts; one of so many tokens keeps a large GPU busy by itself.
MAX_PART_TOKENS = 16384
MAX_PART_SEQUENCES = 1024


class ServedModel:
    """Scores conversations with a served model. Calls from several threads share the replicas.

    Raises:
        CheckpointError: the model's configuration and tokenizer cannot be had here.
        ServedModelError: they are not those of the replicas.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        calls: ReplicaCalls,
        *,
        tokenizer_fingerprint: str,
        token_budget: int,
        chat_template: str | None = None,
    ) -> None:
        folder = resolve(model, revision, weights=False)
        if fingerprint(folder, weights=False, chat_template=chat_template) != tokenizer_fingerprint:
            raise ServedModelError(
                f"configuration or tokenizer of {model} on {os.uname().nodename} are not those of the replicas; "
                "serve it with a revision, or from a shared folder"
            )
        config = DecoderConfig.from_folder(folder)
        self._tokenizer = Tokenizer.from_pretrained(folder, config=config, chat_template=chat_template)
        self._calls = calls
        self._part_tokens = min(token_budget, MAX_PART_TOKENS)

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
        order = together(len(conversations), lambda place: conversations[place].prompt or place)
        outcomes: dict[int, Score | ScoringError] = {}
        pending: list[tuple[list[tuple[int, EncodedConversation]], Future[list[float | ScoringError]]]] = []
        try:
            encode = partial(self._tokenizer.encode_batch, truncation=truncation, max_tokens=max_tokens, strict=strict)
            for part in self._parts(conversations, order, encode, outcomes):
                pending.append((part, self._calls.submit([encoded.token_ids for _, encoded in part])))
            for part, answer in pending:
                for (place, encoded), value in zip(part, answer.result(), strict=True):
                    outcomes[place] = _outcome(value, encoded)
        finally:
            for _, answer in pending:
                answer.cancel()
        return [outcomes[place] for place in range(len(conversations))]

    def _parts(
        self,
        conversations: Sequence[Conversation],
        order: Sequence[int],
        encode: Callable[[Sequence[Conversation]], list[EncodedConversation | ScoringError]],
        failed: dict[int, Score | ScoringError],
    ) -> Iterator[list[tuple[int, EncodedConversation]]]:
        """Encoded conversations and their places, in parts; what cannot be encoded goes to `failed`."""
        part: list[tuple[int, EncodedConversation]] = []
        tokens = 0
        for first in range(0, len(order), ENCODED_AT_ONCE):
            places = order[first : first + ENCODED_AT_ONCE]
            encoded = encode([conversations[place] for place in places])
            for place, item in zip(places, encoded, strict=True):
                if not isinstance(item, EncodedConversation):
                    failed[place] = item
                    continue
                length = len(item.token_ids)
                if part and (tokens + length > self._part_tokens or len(part) == MAX_PART_SEQUENCES):
                    yield part
                    part, tokens = [], 0
                part.append((place, item))
                tokens += length
        if part:
            yield part


def _outcome(value: float | ScoringError, encoded: EncodedConversation) -> Score | ScoringError:
    if isinstance(value, ScoringError):
        return value
    return Score(value, len(encoded.token_ids), encoded.truncated, encoded.warnings)


logger = logging.getLogger(__name__)

INGRESS = "ingress"
# A model that sleeps is loaded first.
DESCRIBE_TIMEOUT_S = 900.0
UNITS_AT_ONCE = 4
"""Units that one sending process has under way: while the last part of one is scored, those of others follow."""


@dataclass(frozen=True, slots=True)
class ServedModelSource:
    """A deployment of reward models, and what its replicas said of themselves when the job began.

    `key` stands for all that decides a score; replicas refuse a job that holds another one.
    """

    app: str
    deployment: str
    key: str
    model: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    device: str
    dtype: str
    quantization: str
    token_budget: int
    pool: ActorPool
    chat_template: str | None = None

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
        return cls(app=app, deployment=deployment, pool=pool, **facts)

    def load(self) -> ServedModel:
        """What sends conversations to the replicas, on this worker."""
        calls = ReplicaCalls(self.app, self.deployment, self.key, num_callers=self.pool.num_actors)
        return ServedModel(
            self.model,
            self.revision,
            calls,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            token_budget=self.token_budget,
            chat_template=self.chat_template,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"via_serve": {"app": self.app, "deployment": self.deployment, "model": self.model, "key": self.key}}


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


def _described(app: str, deployment: str) -> dict[str, Any]:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not num_replicas(app, deployment):
        logger.info("no replica of %s runs; waiting for one", deployment)
    try:
        response = serve.get_deployment_handle(deployment, app).describe.remote()
        return dict(response.result(timeout_s=DESCRIBE_TIMEOUT_S))
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ServedModelError(f"--via-serve {app}: {deployment} does not say what it is: {last}") from error


def _check(options: ScoringOptions, facts: Mapping[str, Any], app: str) -> None:
    """What was said of the model by option must be so."""
    said: dict[str, str] = {"device": options.device, "dtype": options.dtype}
    if options.dtype in DTYPES:
        said["dtype"] = str(DTYPES[options.dtype]).removeprefix("torch.")
    differing = [
        f"{name} {facts[name]}, not {value}" for name, value in said.items() if value not in ("auto", facts[name])
    ]
    if options.model is not None:
        ours = fingerprint(resolve(options.model, options.revision), chat_template=facts.get("chat_template"))
        if ours != facts["fingerprint"]:
            differing.append(
                f"{facts['model']} with fingerprint {facts['fingerprint']}, not {options.model} with {ours}"
            )
    if differing:
        raise ServedModelError(
            f"--via-serve {app} serves {'; '.join(differing)}; leave the option out to take it as it is"
        )
