"""Trainers that bring their own wire format: OpenRLHF (0.11), LLaMA-Factory and slime.

They send text decoded with the policy's special tokens. None of them can train on a missing reward: OpenRLHF makes a
tensor of it and fails, LLaMA-Factory the same, slime fails where it averages. So an answer's markup never costs a
reward, `truncation` of the endpoint keeps long ones scored, and what still has none is null.
"""

from __future__ import annotations

from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model import Message
from serve_app.reward_model.rendered_text import without_ending
from serve_app.web.dialects.dialect import (
    EXAMPLE_TEXT,
    Answered,
    Asked,
    Body,
    ChatMessage,
    Dialect,
    Reader,
    checked,
    parse_messages,
)
from serve_app.web.dialects.vllm import ItemError
from serve_app.web.service import ApiError


class GetRewardRequest(Body):
    """One entry per sample in each list. OpenRLHF sends one sample a request, and to its other servers empty lists."""

    query: list[str] = Field(description="Whole rendered texts: ChatML, a known template or the model's own.")
    prompts: list[Any] | None = Field(
        default=None, description="What each query begins with; the answer is what follows. Used where that is so."
    )
    labels: list[Any] | None = Field(default=None, description="Ignored.")

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"query": [EXAMPLE_TEXT], "prompts": [""], "labels": [""]}]}
    )


class GetRewardResponse(BaseModel):
    """One entry per query, in order."""

    rewards: list[float | None] = Field(description="Raw logits; OpenRLHF normalises and clips them where it is told.")
    scores: list[float | None] = Field(description="The same; OpenRLHF filters samples by them.")
    extra_logs: dict[str, list[float]] = Field(default_factory=dict, description="Nothing.")
    errors: list[ItemError] | None = None


def _as_rewards(body: GetRewardRequest, answered: Answered) -> dict[str, Any]:
    values = answered.values()
    return {"rewards": values, "scores": values, "extra_logs": {}, **answered.errors}


DEFAULT_MODEL = "model"
"""LLaMA-Factory's client always sends this name."""


class ScoreEvaluationRequest(Body):
    """Whole decoded texts."""

    model: str | None = Field(default=None, description='Which of the served models; "model" is the first.')
    messages: list[str] = Field(description="Whole rendered texts: ChatML, a known template or the model's own.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens. A longer text loses its oldest turns, then the oldest tokens of its prompt; its last "
        "message and the reward token stay. Without it the endpoint's `truncation` says what is done.",
    )

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"model": DEFAULT_MODEL, "messages": [EXAMPLE_TEXT]}]}
    )

    def model_post_init(self, context: Any, /) -> None:
        if self.model == DEFAULT_MODEL:
            self.model = None


class ScoreEvaluationResponse(BaseModel):
    """One score per text, in order: a raw logit."""

    id: str
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[float | None]
    errors: list[ItemError] | None = None


def _ask_evaluation(reader: Reader, body: ScoreEvaluationRequest) -> Asked:
    if not body.messages:
        raise ApiError(400, "'messages' is empty; send at least one text", "empty", "messages")
    asked = reader.texts(body.messages, field="messages")
    return asked if body.max_length is None else asked.with_limits("left", body.max_length)


def _as_evaluation(body: ScoreEvaluationRequest, answered: Answered) -> dict[str, Any]:
    head = {"id": f"scoreeval-{uuid4().hex}", "object": "score.evaluation", "model": answered.model}
    return {**head, "scores": answered.values(), **answered.errors}


class RmRequest(Body):
    """One sample."""

    prompt: str | list[ChatMessage] = Field(
        description="Messages, or a rendered prompt if it begins with a turn's marker, else one user message."
    )
    response: str = Field(description="The assistant's turn; an end-of-turn or EOS token after it is left out.")
    label: Any = Field(default=None, description="Ignored.")

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [{"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "response": "4", "label": "4"}]
        },
    )


def _ask_sample(reader: Reader, body: RmRequest) -> Asked:
    if isinstance(body.prompt, str):
        return reader.answered(body.prompt, body.response, field="prompt")
    messages = [*parse_messages(body.prompt, field="prompt"), Message("assistant", without_ending(body.response))]
    return Asked([checked(messages, field="prompt")], ["response"])


OPENRLHF = Dialect(
    paths=["/get_reward"],
    summary="Rewards as OpenRLHF's remote reward model gives them",
    description="Scores whole rendered texts, by the first of the served models. A text without a reward has null in "
    "its place, and `errors` says why. Empty lists are answered with such.",
    body=GetRewardRequest,
    answers=GetRewardResponse,
    ask=lambda reader, body: reader.texts(body.query, field="query", prompts=body.prompts),
    answer=_as_rewards,
    ignores_model=lambda body: True,
    always_answers=True,
)
LLAMA_FACTORY = Dialect(
    paths=["/v1/score/evaluation"],
    summary="Scores as LLaMA-Factory's API gives them",
    description="Scores whole rendered texts; none at all are a 400, as in LLaMA-Factory.",
    body=ScoreEvaluationRequest,
    answers=ScoreEvaluationResponse,
    ask=_ask_evaluation,
    answer=_as_evaluation,
    ignores_model=lambda body: True,
)
SLIME = Dialect(
    paths=["/rm"],
    summary="One reward as slime reads it",
    description="Scores one response with the first of the served models: a bare number, the raw logit. A rendered "
    "prompt may end in an open assistant turn, which the response then continues. Special tokens inside the response "
    "stay text.",
    body=RmRequest,
    answers=float,
    ask=_ask_sample,
    answer=lambda body, answered: answered.values()[0],
    ignores_model=lambda body: True,
)
DIALECTS = (OPENRLHF, LLAMA_FACTORY, SLIME)
