"""The text that POLAR's models read: a response beside a reference, and no chat markup.

    prompt
    reference<|reward|>prompt
    response[UNUSED_TOKEN_130]

It is the text of `RewardModelClient.encode` in POLAR's repository (github.com/InternLM/POLAR, src/polar/reward_func.py,
wrapper "sft"): the contents of a list of messages are joined by newlines and their roles left out. `<|reward|>`
separates the two trajectories, and the score is read at the reward token, which the text form calls
`[UNUSED_TOKEN_130]`. A conversation of one message has no prompt: its trajectories stand as they are, as the client's
wrapper "pretrain" writes them. Unlike the client, which drops special tokens that a message spells and cuts a
reference or response over 4,096 tokens with a printed line, nothing is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.rendered_text import RenderedTextError

SEPARATOR = "<|reward|>"
END = "[UNUSED_TOKEN_130]"


def render_polar(contents: Sequence[str], reference: str | None) -> str:
    """The text of messages with `contents`, the last one the response; the reward token's id is put behind it.

    Raises:
        ConversationError: there is no reference.
    """
    if reference is None:
        raise ConversationError(
            "this is a POLAR model, which compares the response with a reference, and there is none: give "
            "Conversation.reference in Python, 'reference' beside 'messages' over HTTP, --reference-column in jobs"
        )
    *prompt, response = contents
    front = "\n".join(prompt) + "\n" if prompt else ""
    return f"{front}{reference}{SEPARATOR}{front}{response}"


def read_polar(text: str) -> Conversation:
    """The conversation of a text that POLAR's client rendered: it renders as the same text again.

    The prompt is what both trajectories begin with, up to the last newline in it.

    Raises:
        RenderedTextError: it is no such text. The message never quotes the text.
    """
    trimmed = text.rstrip("\n")
    body = trimmed.removesuffix(END) if trimmed.endswith(END) else text
    trajectories = body.split(SEPARATOR)
    if len(trajectories) != 2 or END in body:
        raise RenderedTextError(
            f"the text is none that POLAR's client renders: prompt, newline, reference, {SEPARATOR}, the same prompt, "
            f"newline, response, {END}"
        )
    first, second = trajectories
    pairs = enumerate(zip(first, second, strict=False))
    shared = next((at for at, (one, two) in pairs if one != two), min(len(first), len(second)))
    stop = first.rfind("\n", 0, shared)
    if stop < 0:
        return Conversation.parse(Conversation((Message("assistant", second),), reference=first))
    messages = (Message("user", first[:stop]), Message("assistant", second[stop + 1 :]))
    return Conversation.parse(Conversation(messages, reference=first[stop + 1 :]))
