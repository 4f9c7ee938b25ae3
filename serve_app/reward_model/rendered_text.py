"""Rendered text -> conversation: the way back from what a trainer's tokenizer decoded or its chat template wrote.

Read are the turn formats of `turn_formats.py`, whatever model the text is meant for, and the model's own chat template,
whose strings are learnt by rendering probe conversations. Special-token strings delimit turns here, unlike inside a
message. What stands around the turns is left out, since the conversation is rendered afresh and gets its own BOS and
reward token:

- before the first turn, in any number and order: whitespace, `LEADING` and the model's BOS, EOS and padding token;
- after the last turn, in any number and order: whitespace, `ENDINGS` and the model's EOS, padding and reward token.
  This run is cut once, at the first end of turn in it: an end mark of another sort before that is the answer's.

A text is never refused for what its answer holds. The answer begins at the last assistant's opening that follows
complete turns, and all behind it is the answer's text: half a turn, somebody else's turn, stray markup. A policy that
goes on to write a whole exchange and opens the assistant's turn again cannot be told from a conversation of several
turns by the text alone; where the prompt is known, `read` takes it and the answer begins where that ends. A last turn
of the assistant's that is open and empty, behind another of the assistant's, is a generation prompt, no answer: it is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError
from serve_app.reward_model.turn_formats import CHATML, ENDS_OF_TURNS, FORMATS, TurnFormat, TurnSpan

REWARD = "<|reward|>"
LEADING = (
    "<s>",
    "</s>",
    "<bos>",
    "<pad>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
"""Texts of BOS and left padding of the policies whose trainers send text."""
ENDINGS = (*ENDS_OF_TURNS, REWARD, "<eos>", "<pad>", "<|end_of_text|>", "<|endoftext|>")
"""Texts that policies end a response in: their end of turn, EOS or padding, and InternLM2's reward token."""
TURN_OPENINGS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|header_start|>",
    "<start_of_turn>",
    "<|system|>",
    "<|user|>",
    "[INST]",
    "[SYSTEM_PROMPT]",
    "<\uff5cUser\uff5c>",
)

PROBES = (
    ("user",),
    ("user", "assistant"),
    ("system", "user"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
)
"""Roles of the conversations that a template is learnt from: every transition, first, in the middle and last."""
PROBE_ANSWER = "Qz0zQ"

Render = Callable[[Sequence[Message]], str]


class RenderedTextError(ConversationError):
    """A text is in no format that is read. The message never quotes the text."""


def opens_turn(text: str) -> bool:
    """Whether `text` begins, after BOS or padding, with a known template's opening of a turn (`TURN_OPENINGS`)."""
    return text.startswith(TURN_OPENINGS, _start(LEADING, text))


def without_ending(text: str) -> str:
    """A response as a policy decoded it, without the `ENDINGS` after it."""
    return text[: _end(ENDINGS, text)]


@dataclass(frozen=True, slots=True)
class _Reading:
    """Messages read from a text, and where the content of the last one begins in it."""

    messages: list[Message]
    answer_start: int


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

    def read(self, text: str, *, prompt: str | None = None) -> Conversation:
        """The conversation that `text` is a rendering of.

        A default system prompt in it becomes a system message. A reading by the model's template counts only if the
        template renders what stands before the answer just so.

        Args:
            text: the whole rendered text.
            prompt: what `text` begins with, up to the answer, where that is known: rendered, with or without BOS, or
                plain, which then is one message of the user's. It is not used where `text` begins otherwise, as where
                decoding changed a space.

        Raises:
            RenderedTextError: it has no format that is read, or a turn before the answer is broken; the message says
                what was expected.
        """
        body = text[_start(self._leading, text) :]
        stop = self._prompt_length(body, prompt)
        reading = self._reading(body, stop)
        if reading is not None:
            return Conversation.parse(reading.messages)
        if stop is not None and not body.startswith(TURN_OPENINGS):
            answer = body[stop:]
            question = prompt if prompt is not None and prompt.lstrip() == body[:stop] else body[:stop]
            messages = [Message("user", question), Message("assistant", answer[: _end(self._endings, answer)])]
            return Conversation.parse(messages)
        raise RenderedTextError(self._expected(body))

    def _prompt_length(self, body: str, prompt: str | None) -> int | None:
        """How long the known prompt is in `body`; None where it is not known or `body` does not begin with it."""
        front = "" if prompt is None else prompt[_start(self._leading, prompt) :]
        return len(front) if front and body.startswith(front) else None

    def _reading(self, body: str, stop: int | None) -> _Reading | None:
        """The reading whose answer begins last; of several such ChatML's, the model's own template's, any other's.

        ChatML with a marker in a turn before the answer is read after the model's own template, which may write it.
        """
        chatml = self._read_format(CHATML, body, stop)
        if chatml is not None and not _holds(CHATML.markers, chatml.messages[:-1]):
            return chatml
        readings = [self._read_own(body, stop), chatml]
        readings += [self._read_format(known, body, stop) for known in FORMATS if known is not CHATML]
        return max(filter(None, readings), key=lambda reading: reading.answer_start, default=None)

    def _read_format(self, known: TurnFormat, body: str, stop: int | None) -> _Reading | None:
        spans = known.spans(body, stop=len(body) if stop is None else stop)
        return None if spans is None else self._answered(body, spans, stop, ends=known.ends, markers=known.markers)

    def _read_own(self, body: str, stop: int | None) -> _Reading | None:
        template = self._template
        spans = template.spans(body, stop=len(body) if stop is None else stop)
        if spans is None:
            return None
        ends = [text.strip() for text in template.closings.get("assistant", ()) if text.strip()]
        reading = self._answered(body, spans, stop, ends=ends, markers=template.markers)
        if reading is None or not self._confirms(reading, body):
            return None
        return reading

    def _answered(
        self,
        body: str,
        spans: Sequence[TurnSpan],
        stop: int | None,
        *,
        ends: Collection[str],
        markers: Collection[str],
    ) -> _Reading | None:
        """The turns up to the answer as messages, and the answer; None if they are broken or there is no response."""
        place = next((at for at in reversed(range(len(spans))) if spans[at].role == "assistant"), None)
        if stop is not None:
            return self._continued(body, spans, stop, ends)
        if place is None:
            return self._without_answer(body, spans, ends, markers)
        span = spans[place]
        answer = self._cut(body[span.start :], ends)
        is_open = not any(end in body[span.start :] for end in ends)
        if is_open and not answer.strip() and place and spans[place - 1].role == "assistant":
            raise RenderedTextError(
                "the text ends in an assistant's turn that is open and empty, behind another of the assistant's: "
                "render the conversation without add_generation_prompt=True"
            )
        return self._checked([*_messages(body, spans[:place]), Message("assistant", answer)], span.start)

    def _continued(self, body: str, spans: Sequence[TurnSpan], stop: int, ends: Collection[str]) -> _Reading | None:
        """The known prompt's turns; an assistant's turn that it opens goes on behind it."""
        last = spans[-1]
        inside = body[last.start : stop]
        if last.role != "assistant":
            before = [*_messages(body, spans[:-1]), Message(last.role, self._cut(inside, ends))]
            return self._checked([*before, Message("assistant", self._cut(body[stop:], ends))], stop)
        if inside.rstrip().endswith(tuple(ends)):
            raise RenderedTextError("the prompt ends in a finished assistant turn, so there is no place for a response")
        answer = self._cut(body[last.start :], ends)
        return self._checked([*_messages(body, spans[:-1]), Message("assistant", answer)], last.start)

    def _without_answer(
        self, body: str, spans: Sequence[TurnSpan], ends: Collection[str], markers: Collection[str]
    ) -> _Reading | None:
        """Turns none of which is the assistant's: taken only as they should be, without markup in them."""
        last = spans[-1]
        messages = [*_messages(body, spans[:-1]), Message(last.role, self._cut(body[last.start :], ends))]
        return None if _holds(markers, messages) else self._checked(messages, last.start)

    def _checked(self, messages: list[Message], answer_start: int) -> _Reading | None:
        """A special token in a role, as InternLM2's `system name=<|plugin|>`, would not become one again: refused."""
        return None if any("<|" in message.role for message in messages) else _Reading(messages, answer_start)

    def _cut(self, text: str, ends: Collection[str]) -> str:
        """The last turn's content: what stands before the first end of turn in the run of endings at its end."""
        run = _end((*ends, *self._endings), text)
        found = [at for end in ends if (at := text.find(end, run)) >= 0]
        return text[: min(found, default=run)]

    def _confirms(self, reading: _Reading, body: str) -> bool:
        """Whether the template renders what stands before the answer as it stands in `body`."""
        *prompt, last = reading.messages
        try:
            rendered = self._render([*prompt, Message(last.role, PROBE_ANSWER)])
        except ConversationError:
            return False
        head = body[: reading.answer_start]
        return rendered.startswith(head.rstrip(), _start(self._leading, rendered))

    def _expected(self, body: str) -> str:
        if body.startswith(CHATML.begins[0]):
            return (
                "the text begins with <|im_start|> but is not ChatML: each turn is <|im_start|>, a role, a newline, "
                "the content and <|im_end|> with a newline after it; only the last may lack its end"
            )
        names = ", ".join(known.name for known in FORMATS if known is not CHATML)
        return (
            "the text is no rendered conversation: looked for ChatML (<|im_start|>role, newline, content, <|im_end|>), "
            f"the templates of {names}, and this model's own ({self._template.markers_named})"
        )

    @cached_property
    def _template(self) -> _Template:
        return _Template.learn(self._render, leading=self._leading, special_tokens=self._special_tokens)


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

    def spans(self, body: str, *, stop: int) -> list[TurnSpan] | None:
        """The turns of `body` that open before `stop`, or None if it opens otherwise.

        At each place the longest string that fits counts: one that holds a default system prompt before one that
        begins like it.
        """
        opening = max((opening for opening in self.openings if body.startswith(opening)), key=len, default=None)
        if opening is None:
            return None
        role, at = self.openings[opening], len(opening)
        patterns = {role: _any_of(gaps) for role, gaps in self.transitions.items()}
        found = []
        while role in patterns and (match := patterns[role].search(body, at)) and match.start() < stop:
            found.append(TurnSpan(role, at, match.start()))
            role, at = self.transitions[role][match[0]], match.end()
        return [*found, TurnSpan(role, at, len(body))]

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


def _messages(body: str, spans: Sequence[TurnSpan]) -> list[Message]:
    """Complete turns; a system message that held nothing but a template's own preamble is none."""
    messages = [Message(span.role, body[span.start : span.stop]) for span in spans]
    return [message for message in messages if message.role != "system" or message.content]


def _holds(markers: Collection[str], messages: Sequence[Message]) -> bool:
    return any(marker in message.content for message in messages for marker in markers)


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
