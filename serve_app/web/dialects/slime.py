"""`POST /rm` as slime calls a reward model (`--rm-type remote_rm`) and reads it: the bare JSON number.

slime sends one sample a request: its prompt, as a string or as messages, the decoded response, and the label.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from serve_app.reward_model import Conversation, Message
from serve_app.reward_model.rendered_text import opens_turn, without_ending
from serve_app.web.dialects.openai_shape import ChatMessage, checked, parse_messages, read_texts
from serve_app.web.service import ApiError, ScoringService

EXAMPLE: JsonDict = {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "response": "4", "label": "4"}


class RmRequest(BaseModel):
    """One sample."""

    prompt: str | list[ChatMessage] = Field(
        description="Messages, or a rendered prompt if it begins with a turn's marker, else one user message."
    )
    response: str = Field(description="The assistant's turn; an end-of-turn or EOS token after it is left out.")
    label: Any = Field(default=None, description="Ignored.")

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [EXAMPLE]})


def routes(service: ScoringService) -> APIRouter:
    """`POST /rm`."""
    router = APIRouter(tags=["dialects"])

    @router.post("/rm", summary="One reward as slime reads it")
    async def rm(body: RmRequest) -> float:
        """Scores one response with the first of the served models: a bare number, the raw logit.

        A rendered prompt may end in an open assistant turn, which the response then continues. Special tokens inside
        the response stay text.
        """
        model = service.model_name(None)
        scores = await service.score(model, [_conversation(service, model, body)], params=["response"])
        return scores[0].value

    return router


def _conversation(service: ScoringService, model: str, body: RmRequest) -> Conversation:
    response = Message("assistant", without_ending(body.response))
    if not isinstance(body.prompt, str):
        prompt = parse_messages(body.prompt, field="prompt")
        return checked([*prompt, response], field="prompt")
    if not opens_turn(body.prompt):
        return checked([Message("user", body.prompt), response], field="prompt")
    *before, last = read_texts(service, model, body.prompt, field="prompt")[0].messages
    if last.role != "assistant":
        return checked([*before, last, response], field="response")
    # Contents of an open turn end the text; those of a finished one have its end behind them.
    if not body.prompt.endswith(last.content):
        raise ApiError(422, "the prompt ends in a finished assistant turn", "finished_turn", "prompt")
    return checked([*before, Message(last.role, last.content + response.content)], field="response")
