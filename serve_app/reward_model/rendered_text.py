"""Rendered text -> conversation: the way back from what a trainer's tokenizer decoded or its chat template wrote.

Two forms are read: ChatML, whatever model it is meant for, and the model's own chat template, whose strings are
learnt by rendering probe conversations. Special-token strings delimit turns here, unlike inside a message. What
stands around the turns is left out, since the conversation is rendered afresh and gets its own BOS and reward token:

- before the first turn, in any number and order: whitespace, `LEADING` and the model's BOS, EOS and padding token;
- after the last turn, in any number and order: whitespace, `ENDINGS` and the model's EOS, padding and reward token.

The last turn may lack its end, as trainers strip it; then all of it is content but such endings. A last turn of the
assistant's that is open and empty, behind another of the assistant's, is no response but a generation prompt: refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
REWARD = "<|reward|>"
LEADING = ("<s>", "</s>", "<bos>", "<pad>", "<|begin_of_text|>", "<|endoftext|>")
"""Texts of BOS and left padding of the policies whose trainers send text."""
ENDINGS = (IM_END, REWARD, "</s>", "<eos>", "<pad>", "<end_of_turn>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
"""Texts that policies end a response in: their end of turn, EOS or padding, and InternLM2's reward token."""
TURN_OPENINGS = (IM_START, "<|start_header_id|>", "<start_of_turn>", "<|system|>", "<|user|>", "[INST]")

PROBES = (
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant"),
)
"""Roles of the conversations that a template is learnt from: every transition, first, in the middle and last."""

Render = Callable[[Sequence[Message]], str]


class RenderedTextError(ConversationError):
    """A text is neither ChatML nor in the model's own template. The message never quotes the text."""


def opens_turn(text: str) -> bool:
    """Whether `text` begins, after BOS or padding, with a known template's opening of a turn (`TURN_OPENINGS`)."""
    return text.startswith(TURN_OPENINGS, _start(LEADING, text))


def without_ending(text: str) -> str:
    """A response as a policy decoded it, without the `ENDINGS` after it."""
    return text[: _end(ENDINGS, text)]


class RenderedTextReader:
    """Reads the texts that are sent to one model.

    Args:
        render: the text of messages in the model's chat template; raises `ConversationError` where that refuses them.
        special_tokens: the texts of the tokenizer's special tokens.
        framing: the texts of the model's BOS, EOS, padding and reward token, those of them that it has.
    """

    def __init__(self, render: Render, *, special_tokens: Collection[str], framing: Collection[str]) -> None:
        self._render = render
        self._special_tokens = special_tokens
        self._leading = (*LEADING, *framing)
        self._endings = (*ENDINGS, *framing)

    def read(self, text: str) -> Conversation:
        """The conversation that `text` is a rendering of.

        A default system prompt in it becomes a system message. ChatML is read alone by its markers. A reading by
        the model's template counts only if the template renders it as `text` again, but for what the module names.

        Raises:
            RenderedTextError: it has neither form, or a turn is broken; the message says what was expected.
        """
        body = text[_start(self._leading, text) :]
        if body.startswith(IM_START):
            messages = self._read_chatml(body) or self._read_template(body)
            if messages is not None and _ends_in_generation_prompt(messages, body):
                raise RenderedTextError(
                    "the text ends in an assistant's turn that is open and empty, behind another of the assistant's: "
                    "render the conversation without add_generation_prompt=True"
                )
            if messages is None:
                raise RenderedTextError(
                    f"the text begins with {IM_START} but is not ChatML: each turn is {IM_START}, a role, a newline, "
                    f"the content and {IM_END} with a newline after it; only the last may lack its end"
                )
        else:
            messages = self._read_template(body)
            if messages is None:
                raise RenderedTextError(
                    f"the text is no rendered conversation: looked for ChatML ({IM_START}role, newline, content, "
                    f"{IM_END}) and for this model's chat template ({self._template.markers_named})"
                )
        return Conversation.parse(messages)

    def _read_chatml(self, body: str) -> list[Message] | None:
        *turns, last = body.split(IM_START)[1:]
        end = IM_END + "\n"
        if not all(turn.endswith(end) for turn in turns):
            return None
        role, newline, content = last.partition("\n")  # apart, or an empty content's newline would count as an ending
        bare = [*(turn.removesuffix(end) for turn in turns), role + newline + self._without_end(content)]
        messages = [message for turn in bare if (message := _chatml_message(turn))]
        return messages if len(messages) == len(bare) else None

    def _without_end(self, text: str) -> str:
        """The last turn's content up to its end, if only endings follow that, else all of it but endings."""
        content, closed, rest = text.partition(IM_END)
        if closed and not rest[: _end(self._endings, rest)].strip():
            return content
        return text[: _end(self._endings, text)]

    def _read_template(self, body: str) -> list[Message] | None:
        found = self._template.split(body)
        if found is None:
            return None
        *messages, last = found.messages
        head, rest = body[: found.last_start], body[found.last_start :]
        closings = self._template.closings[last.role]
        for closing in filter(None, map(str.rstrip, closings)):
            read = [*messages, Message(last.role, rest.partition(closing)[0])]
            if closing in rest and self._confirms(read, body):
                return read
        content = rest[: _end(self._endings, rest)]
        read = [*messages, Message(last.role, content)]
        return read if any(self._confirms(read, head + content + closing) for closing in closings) else None

    def _confirms(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the template renders `messages` as `text` but for its ends, and no content holds a turn's marker."""
        if any(marker in message.content for message in messages for marker in self._template.markers):
            return False
        try:
            rendered = self._render(messages)
        except ConversationError:
            return False
        rendered = rendered[_start(self._leading, rendered) :]
        return rendered[: _end(self._endings, rendered)].rstrip() == text[: _end(self._endings, text)].rstrip()

    @cached_property
    def _template(self) -> _Template:
        return _Template.learn(self._render, leading=self._leading, special_tokens=self._special_tokens)


@dataclass(frozen=True, slots=True)
class _Turns:
    """Messages of a text, the last one still without content, and where that content begins."""

    messages: list[Message]
    last_start: int


@dataclass(frozen=True, slots=True)
class _Template:
    """The strings that a chat template writes around contents.

    `openings` leads from the text before a first message to its role, `transitions` from a message's role and the
    text behind it to the next one's role, and `closings` from the last message's role to what follows it.
    """

    openings: dict[str, str]
    transitions: dict[str, dict[str, str]]
    closings: dict[str, set[str]]
    markers: frozenset[str]

    @classmethod
    def learn(cls, render: Render, *, leading: Collection[str], special_tokens: Collection[str]) -> _Template:
        openings: dict[str, str] = {}
        transitions: dict[str, dict[str, str]] = {}
        closings: dict[str, set[str]] = {}
        for roles in PROBES:
            gaps = _probe(render, roles)
            if gaps is None:
                continue
            # A string of white space alone marks nothing; a template that has such an opening is not recognised.
            opening = gaps[0][_start(leading, gaps[0]) :]
            if opening.strip():
                openings.setdefault(opening, roles[0])
            for role, following, gap in zip(roles[:-1], roles[1:], gaps[1:-1], strict=True):
                if gap.strip():
                    transitions.setdefault(role, {}).setdefault(gap, following)
            closings.setdefault(roles[-1], set()).add(gaps[-1])
        written = [*openings, *(gap for gaps in transitions.values() for gap in gaps)]
        markers = frozenset(token for token in special_tokens if token and any(token in gap for gap in written))
        return cls(openings, transitions, closings, markers)

    def split(self, body: str) -> _Turns | None:
        """The turns of `body`, or None if it opens otherwise or ends in a role that the template never ends in.

        At each place the longest string that fits counts: one that holds a default system prompt before one that
        begins like it.
        """
        opening = max((opening for opening in self.openings if body.startswith(opening)), key=len, default=None)
        if opening is None:
            return None
        role, at = self.openings[opening], len(opening)
        patterns = {role: _any_of(gaps) for role, gaps in self.transitions.items()}
        messages = []
        while role in patterns and (match := patterns[role].search(body, at)):
            messages.append(Message(role, body[at : match.start()]))
            role, at = self.transitions[role][match[0]], match.end()
        if role not in self.closings:
            return None
        return _Turns([*messages, Message(role, "")], at)

    @property
    def markers_named(self) -> str:
        named = sorted(self.markers) or sorted(self.openings)
        return ", ".join(marker.strip() for marker in named) or "which marks no turns"


def _probe(render: Render, roles: Sequence[str]) -> list[str] | None:
    """What the template writes before, between and after contents, or None if it refuses or reorders them."""
    contents = [f"Qz{place}zQ" for place in range(len(roles))]
    try:
        rest = render([Message(role, content) for role, content in zip(roles, contents, strict=True)])
    except ConversationError:
        return None
    gaps = []
    for content in contents:
        gap, found, rest = rest.partition(content)
        if not found:
            return None
        gaps.append(gap)
    return [*gaps, rest]


def _chatml_message(turn: str) -> Message | None:
    """`role`, newline, content as a message; None where a role or a newline is missing or a marker is left over.

    A special token in a role, as InternLM2's `system name=<|plugin|>`, would not become one again: it is refused.
    """
    role, newline, content = turn.partition("\n")
    if not newline or not role.strip() or "<|" in role or IM_END in content:
        return None
    return Message(role, content)


def _ends_in_generation_prompt(messages: Sequence[Message], body: str) -> bool:
    if len(messages) < 2 or messages[-1].content.strip():
        return False
    is_open = IM_END not in body[body.rfind(IM_START) :]
    return is_open and messages[-1].role == messages[-2].role == "assistant"


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _start(leading: Collection[str], text: str) -> int:
    """Where `text` begins after whitespace and any of `leading`."""
    match = re.match(rf"(?:\s|{_any_of(leading).pattern})*+", text)
    return 0 if match is None else match.end()


def _end(endings: Collection[str], text: str) -> int:
    """Where `text` ends before any of `endings`; whitespace goes only with an ending in front of it.

    The newline before the reward token belongs to the template. Linear in the length, as clients send the text.
    """
    end = len(text)
    while True:
        bare = end
        while bare and text[bare - 1].isspace():
            bare -= 1
        ending = next((ending for ending in endings if text.endswith(ending, 0, bare)), None)
        if ending is None:
            return end
        end = bare - len(ending)
        if ending == REWARD and text.endswith("\n", 0, end):
            end -= 1
