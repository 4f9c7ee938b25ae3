"""A table of how families of chat templates write turns, by which `rendered_text.py` reads the texts of any policy.

One row per family, in regular expressions. Contents are whatever stands between an opening and the next closing that
another turn's opening follows, so that a lone marker in a content remains text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ROLES = {"model": "assistant", "ipython": "tool", "tool_response": "tool"}
"""Roles that templates call otherwise."""
DEEPSEEK_EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@dataclass(frozen=True, slots=True)
class Turn:
    """One role's turns. `opening` and `closing` are regular expressions.

    Where `role` is empty, the opening's group `role` names it. `after` holds the roles that such a turn may follow,
    with `""` for the start of the text; None allows any.
    """

    role: str
    opening: str
    closing: str
    after: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """A turn of a text: its role, and where its content begins and ends."""

    role: str
    start: int
    stop: int


class TurnFormat:
    """How one family of chat templates writes turns.

    Args:
        name: whose templates these are.
        turns: what opens and closes each role's turns; the first that fits counts.
        ends: texts that end the assistant's turn.
        begins: texts of which a rendering holds one.
    """

    def __init__(self, name: str, turns: Sequence[Turn], *, ends: Sequence[str], begins: Sequence[str]) -> None:
        self.name = name
        self.ends = tuple(ends)
        self.begins = tuple(begins)
        self.markers = (*self.ends, *self.begins)
        self._turns = tuple(turns)
        self._first = self._openings("")
        self._after = {role for turn in turns for role in turn.after or ()}
        self._next: dict[tuple[int, str], re.Pattern[str]] = {}

    def spans(self, body: str, *, stop: int) -> list[TurnSpan] | None:
        """The turns of `body` that open before `stop`, each up to its closing; None if `body` does not open with one.

        The last one's content reaches to the end of the text. Linear in the length of `body`.
        """
        if not any(body.find(marker, 0, stop) >= 0 for marker in self.begins):
            return None
        match = re.match(self._first, body)
        found: list[TurnSpan] = []
        while match is not None and match.start() < stop:
            at = next(place for place in range(len(self._turns)) if match[f"turn{place}"] is not None)
            named = self._turns[at].role or match["role"]
            role = ROLES.get(named, named)
            if found:
                found[-1] = TurnSpan(found[-1].role, found[-1].start, match.start())
            found.append(TurnSpan(role, match.end(), len(body)))
            match = self._behind(at, role).search(body, match.end())
        return found or None

    def _behind(self, place: int, role: str) -> re.Pattern[str]:
        """The end of a turn and what opens the next one."""
        key = (place, role if role in self._after else "any")  # texts name roles without number
        if key not in self._next:
            self._next[key] = re.compile(self._turns[place].closing + self._openings(key[1]))
        return self._next[key]

    def _openings(self, role: str) -> str:
        allowed = [
            f"(?P<turn{place}>{turn.opening})" if turn.after is None or role in turn.after else f"(?P<turn{place}>(?!))"
            for place, turn in enumerate(self._turns)
        ]
        return f"(?:{'|'.join(allowed)})"


_NAME = r"(?P<role>[a-z_]{1,32})"
_LLAMA_SYSTEM = r"(?:(?:Cutting Knowledge Date: [^\n]*\n)?Today Date: [^\n]*\n\n)?"
"""Llama 3.1's template writes dates before every system prompt: by them a score would change from day to day."""

CHATML = TurnFormat(
    "ChatML",
    [Turn("", r"<\|im_start\|>(?P<role>[^\s<][^\n]{0,63})\n", r"<\|im_end\|>\n")],
    ends=["<|im_end|>"],
    begins=["<|im_start|>"],
)
FORMATS = (
    CHATML,
    TurnFormat(
        "Phi-4",
        [Turn("", rf"<\|im_start\|>{_NAME}<\|im_sep\|>", r"<\|im_end\|>")],
        ends=["<|im_end|>"],
        begins=["<|im_sep|>"],
    ),
    TurnFormat(
        "Llama 3",
        [
            Turn("system", rf"<\|start_header_id\|>system<\|end_header_id\|>\n\n{_LLAMA_SYSTEM}", r"<\|eot_id\|>"),
            Turn("", rf"<\|start_header_id\|>{_NAME}<\|end_header_id\|>\n\n", r"<\|eo[tm]_id\|>"),
        ],
        ends=["<|eot_id|>", "<|eom_id|>"],
        begins=["<|start_header_id|>"],
    ),
    TurnFormat(
        "Llama 4",
        [Turn("", rf"<\|header_start\|>{_NAME}<\|header_end\|>\n\n", r"<\|eo[tm]\|>")],
        ends=["<|eot|>", "<|eom|>"],
        begins=["<|header_start|>"],
    ),
    TurnFormat(
        "Gemma",
        [Turn("", rf"<start_of_turn>{_NAME}\n", r"<end_of_turn>\n")],
        ends=["<end_of_turn>"],
        begins=["<start_of_turn>"],
    ),
    TurnFormat(
        "Mistral and Llama 2",
        [
            Turn("system", r"\[SYSTEM_PROMPT\] ?", r"\[/SYSTEM_PROMPT\]"),
            Turn("system", r"\[INST\] ?<<SYS>>\n", r"\n<</SYS>>\n\n", after=("",)),
            Turn("user", r"\[INST\] ?", r" ?\[/INST\]"),
            Turn("user", "", r" ?\[/INST\]", after=("system",)),
            Turn("assistant", " ?", r" ?</s>(?:<s>)? ?", after=("user",)),
        ],
        ends=[" </s>", "</s>"],
        begins=["[INST]"],
    ),
    TurnFormat(
        "DeepSeek",
        [
            Turn("user", "<\uff5cUser\uff5c>", ""),
            Turn("assistant", "<\uff5cAssistant\uff5c>", DEEPSEEK_EOS, after=("user",)),
            Turn("system", "", "", after=("",)),
        ],
        ends=[DEEPSEEK_EOS],
        begins=["<\uff5cUser\uff5c>"],
    ),
    TurnFormat(
        "Phi-3", [Turn("", rf"<\|{_NAME}\|>\n?", r"<\|end\|>\n?")], ends=["<|end|>"], begins=["<|user|>", "<|system|>"]
    ),
    TurnFormat("Zephyr", [Turn("", rf"<\|{_NAME}\|>\n", r"</s>\n")], ends=["</s>"], begins=["<|user|>", "<|system|>"]),
    TurnFormat(
        "Tulu",
        [
            Turn("assistant", r"<\|assistant\|>\n", r"<\|endoftext\|>\n"),
            Turn("", r"<\|(?P<role>user|system)\|>\n", r"\n"),
        ],
        ends=["<|endoftext|>"],
        begins=["<|user|>"],
    ),
)
ENDS_OF_TURNS = tuple(dict.fromkeys(end.strip() for known in FORMATS for end in known.ends))
TURN_MARKUP = tuple(
    dict.fromkeys(mark.strip() for known in FORMATS for mark in known.markers if mark.strip() != "</s>")
)
"""Texts that templates write around turns, and people hardly ever: `</s>` is HTML too."""
