"""SGLang: `/classify` and `/encode`, its native API, and `/v1/rerank` below `/sglang`, which answers a list.

POLAR and XTuner call `/classify` with a list in `text` and read `[i].embedding[0]`. A lone text, a lone conversation or
the ids of one get an object, as SGLang answers them. vLLM serves `/classify` too: the key of the body tells them apart.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from serve_app.reward_model.scores import order
from serve_app.web.dialects.dialect import (
    EXAMPLE_TEXT,
    Answered,
    Asked,
    Body,
    ChatMessage,
    Dialect,
    Reader,
    TokenIds,
    is_lone,
)
from serve_app.web.dialects.rerank import RerankRequest, ask_rerank
from serve_app.web.dialects.vllm import RAW, Classifications, InputOrMessages, as_classes, text_or_messages
from serve_app.web.service import ApiError

NATIVE = ("text", "conv", "input_ids")


class NativeRequest(Body):
    """One of `text`, `conv` and `input_ids`."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"text": [EXAMPLE_TEXT]}]})

    text: str | list[str] | None = Field(default=None, description="Rendered text, or a list of them.")
    conv: list[ChatMessage] | list[list[ChatMessage]] | None = Field(
        default=None, description="A conversation of messages, or a list of them."
    )
    input_ids: TokenIds | list[TokenIds] | None = Field(
        default=None, description="Token ids of a rendered text in the reward model's vocabulary, or a list of them."
    )
    rid: Any = Field(default=None, description="Ignored.")
    sampling_params: Any = Field(default=None, description="Ignored.")


class ClassifyRequest(InputOrMessages, NativeRequest):
    """vLLM's body with `input` or `messages`, or SGLang's with `text`, `conv` or `input_ids`."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"input": [EXAMPLE_TEXT]}, {"text": [EXAMPLE_TEXT]}]}
    )


class MetaInfo(BaseModel):
    """Tokens read for one text, and why it has no score, where it has none."""

    id: str
    prompt_tokens: int
    error: str | None = None


class NativeScore(BaseModel):
    """One text's score, as an embedding of one dimension."""

    embedding: list[float | None]
    meta_info: MetaInfo


class RankedDocument(BaseModel):
    """One document of `/v1/rerank`, the best first."""

    score: float
    document: str
    index: int
    meta_info: dict[str, Any]


def _given(body: NativeRequest) -> list[str]:
    return [name for name in NATIVE if getattr(body, name) is not None]


def _ask_native(reader: Reader, body: NativeRequest) -> Asked:
    given = _given(body)
    if len(given) != 1:
        raise ApiError(422, f"send exactly one of {', '.join(map(repr, NATIVE))}", "exactly_one_field", "text")
    if body.conv is None:
        texts = body.text if body.text is not None else body.input_ids
        assert texts is not None
        return reader.texts(texts, field=given[0])
    asked = [
        reader.messages(messages, field=f"conv[{at}]" if not _is_lone(body) else "conv")
        for at, messages in enumerate(_conversations(body))
    ]
    return Asked([each.conversations[0] for each in asked], [each.params[0] for each in asked])


def _conversations(body: NativeRequest) -> list[list[ChatMessage]]:
    conv: Any = body.conv
    return [conv] if _is_lone(body) else conv


def _is_lone(body: NativeRequest) -> bool:
    if body.conv is not None:
        return bool(body.conv) and isinstance(body.conv[0], ChatMessage)
    texts = body.text if body.text is not None else body.input_ids
    return texts is not None and is_lone(texts)


def _as_native(body: NativeRequest, answered: Answered, *, activation: bool = False) -> Any:
    rows = [
        {
            "embedding": [value],
            "meta_info": {"id": uuid4().hex, "prompt_tokens": num_tokens}
            | ({"error": outcome.message} if isinstance(outcome, ApiError) else {}),
        }
        for value, num_tokens, outcome in zip(
            answered.values(activation), answered.num_tokens, answered.outcomes, strict=True
        )
    ]
    return rows[0] if _is_lone(body) else rows


def _ask_classify(reader: Reader, body: ClassifyRequest) -> Asked:
    if not _given(body):
        return text_or_messages(reader, body)
    if body.input is not None or body.messages is not None:
        text = "send one of 'text', 'conv' and 'input_ids' (SGLang), or one of 'input' and 'messages' (vLLM)"
        raise ApiError(422, text, "exactly_one_field", "text")
    body.wants_activation  # noqa: B018
    return _ask_native(reader, body).with_limits(*body.limits)


def _as_classify(body: ClassifyRequest, answered: Answered) -> Any:
    if not _given(body):
        return as_classes(body, answered)
    return _as_native(body, answered, activation=body.wants_activation)


def _as_ranked_list(body: RerankRequest, answered: Answered) -> list[Any]:
    values = answered.values(body.wants_activation)
    scored = [at for at, value in enumerate(values) if value is not None]
    best = order([value for value in values if value is not None])[: body.top_n or None]
    return [
        {"score": values[at], "document": body.texts[at], "index": at, "meta_info": {"id": uuid4().hex}}
        for at in (scored[place] for place in best)
    ]


CLASSIFY = Dialect(
    paths=["/classify"],
    summary="Scores as vLLM or SGLang give them",
    description=f"Scores rendered texts or conversations. {RAW} With `input` or `messages` the answer has vLLM's form; "
    "vLLM applies the sigmoid by default and this service does not. With `text`, `conv` or `input_ids` it has SGLang's "
    "form: a list, or an object for a lone text.",
    body=ClassifyRequest,
    answers=Classifications | list[NativeScore] | NativeScore,
    ask=_ask_classify,
    answer=_as_classify,
    ignores_model=lambda body: bool(_given(body)),
)
ENCODE = Dialect(
    paths=["/encode"],
    summary="Scores as SGLang's native API gives them",
    description="Scores rendered texts or conversations: raw logits, in a list, or an object for a lone text.",
    body=NativeRequest,
    answers=list[NativeScore] | NativeScore,
    ask=_ask_native,
    answer=_as_native,
    ignores_model=lambda body: True,
)
RERANK = Dialect(
    paths=["/sglang/v1/rerank"],
    summary="Documents ordered as SGLang gives them",
    description="As `/v1/rerank` with a list, the best first, in place of an object: for clients of SGLang, whose "
    "address is then `HOST:PORT/sglang`.",
    body=RerankRequest,
    answers=list[RankedDocument],
    ask=ask_rerank,
    answer=_as_ranked_list,
    ignores_model=lambda body: True,
)
DIALECTS = (CLASSIFY, ENCODE, RERANK)
