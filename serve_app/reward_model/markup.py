"""Typed text that spells a special token, kept apart from the template's own markup: reward hacking through it fails.

A template's markup must become special tokens, and the same characters typed in a message must not, while both stand
in one rendered string. So a marker character is put inside every special token that a message spells. Then the
tokenizer finds only the template's; its normalizer, which runs afterwards, takes the markers out again.
"""

from __future__ import annotations

import json
import re

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as BackendTokenizer

from serve_app.reward_model.errors import ConversationError

__all__ = ["MARK", "MarkedTextEncoder", "mark", "special_pattern"]

# A Unicode noncharacter, reserved for internal use. In a marked text, MARK + "0" is a marker and MARK + "1" stands
# for the character itself, so that a message which holds it comes through unchanged.
MARK = "\ufdd0"


def special_pattern(backend: BackendTokenizer) -> re.Pattern[str]:
    """Matches any special token's text; longest first, so that no shorter one hides a longer."""
    specials = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    texts = sorted((re.escape(text) for text in specials if text), key=len, reverse=True)
    return re.compile("|".join(texts) or r"(?!)")


def mark(text: str, specials: re.Pattern[str] | None) -> str:
    """`text` with a marker inside each special token it spells, and with its own MARK characters escaped."""
    escaped = text.replace(MARK, MARK + "1")
    return specials.sub(lambda match: match[0][:1] + MARK + "0" + match[0][1:], escaped) if specials else escaped


class MarkedTextEncoder:
    """Encodes marked texts: what is marked becomes ordinary tokens, the markup around it special ones."""

    def __init__(self, backend: BackendTokenizer) -> None:
        self._special_ids = {key for key, token in backend.get_added_tokens_decoder().items() if token.special}
        self._specials = special_pattern(backend)
        self._backend = BackendTokenizer.from_str(_without_special_merges(backend.to_str(), self._special_ids))
        unmark = [normalizers.Replace(MARK + "0", ""), normalizers.Replace(MARK + "1", MARK)]
        own = [self._backend.normalizer] if self._backend.normalizer is not None else []
        self._backend.normalizer = normalizers.Sequence([*unmark, *own])
        # A special token that is looked for after normalization would be found again once its marker is gone.
        self._backend.add_special_tokens(
            [
                AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=True)
                for token in backend.get_added_tokens_decoder().values()
                if token.special and token.normalized
            ]
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a marked text.

        Raises:
            ConversationError: the vocabulary makes a special token of typed text in a way that cannot be undone.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if sum(token in self._special_ids for token in ids) != len(self._specials.findall(text)):
            raise ConversationError("a message spells a special token that this model's vocabulary cannot keep as text")
        return ids


def _without_special_merges(serialized: str, special_ids: set[int]) -> str:
    """A serialized tokenizer without the merges that make a special token of ordinary ones.

    InternLM2's BPE has them: a line that starts with `<s>` would become the BOS token even as plain text.
    """
    parsed = json.loads(serialized)
    model = parsed["model"]
    if model.get("type") == "BPE":
        specials = {piece for piece, token in model["vocab"].items() if token in special_ids}
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in specials]
    return json.dumps(parsed)


def _merged(merge: str | list[str]) -> str:
    """What a merge makes; it is serialized as a pair, or in older files as two pieces with a space between them."""
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
