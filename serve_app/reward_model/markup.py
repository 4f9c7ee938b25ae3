"""Typed text that spells a special token, kept apart from the template's own markup: reward hacking through it fails.

A template's markup must become special tokens, and the same characters typed in a message must not, while both stand
in one rendered string. So a marker character is put inside every special token that a message spells. Then the
tokenizer finds only the template's; its normalizer, which runs afterwards, takes the markers out again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as BackendTokenizer

from serve_app.reward_model.errors import ConversationError

# A Unicode noncharacter, reserved for internal use. In a marked text, MARK + "0" is a marker and MARK + "1" stands
# for the character itself, so that a message which holds it comes through unchanged.
MARK = "\ufdd0"


def escape(text: str) -> str:
    """`text` with its own MARK characters told from markers."""
    return text.replace(MARK, MARK + "1")


@dataclass(frozen=True, slots=True)
class Markup:
    """A tokenizer's special tokens: their `ids`, a `pattern` of their texts, and one of texts that begin or end with
    part of one, which the template around them could complete.
    """

    ids: frozenset[int]
    pattern: re.Pattern[str]
    edges: re.Pattern[str]

    @classmethod
    def of(cls, backend: BackendTokenizer) -> Markup:
        specials = {key: token for key, token in backend.get_added_tokens_decoder().items() if token.special}
        unknown = getattr(backend.model, "unk_token", None)
        ids = {key for key, token in specials.items() if token.content != unknown}
        texts = sorted({token.content for token in specials.values()} - {""}, key=len, reverse=True)
        tails = {re.escape(text[cut:]) for text in texts for cut in range(1, len(text))}
        heads = {re.escape(text[:cut]) for text in texts for cut in range(1, len(text))}
        return cls(
            ids=frozenset(ids),
            pattern=re.compile("|".join(map(re.escape, texts)) or r"(?!)"),  # longest first
            edges=re.compile(rf"\A(?:{'|'.join(tails)})|(?:{'|'.join(heads)})\Z" if texts else r"(?!)"),
        )

    def is_spelled(self, text: str) -> bool:
        """Whether a message's text holds a special token, or could be made one with what stands beside it."""
        return bool(self.pattern.search(text) or self.edges.search(text))

    def mark_if_spelled(self, text: str) -> str:
        """`mark`ed where that is needed, else only escaped."""
        return self.mark(text) if self.is_spelled(text) else escape(text)

    def mark(self, text: str) -> str:
        """`text` with a marker inside each special token it spells, and at its ends, short of space to be trimmed."""
        marked = self.pattern.sub(lambda match: match[0][:1] + MARK + "0" + match[0][1:], escape(text))
        core = marked.strip()
        return marked.replace(core, f"{MARK}0{core}{MARK}0", 1) if core else marked


class MarkedTextEncoder:
    """Encodes marked texts: what is marked becomes ordinary tokens, the markup around it special ones."""

    def __init__(self, backend: BackendTokenizer, markup: Markup) -> None:
        self._markup = markup
        self._backend = BackendTokenizer.from_str(_without_special_merges(backend.to_str(), markup.ids))
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
        expected = [self._backend.token_to_id(match) for match in self._markup.pattern.findall(text)]
        if [token for token in ids if token in self._markup.ids] != [
            token for token in expected if token in self._markup.ids
        ]:
            raise ConversationError("a message spells a special token that this model's vocabulary cannot keep as text")
        return ids


def _without_special_merges(serialized: str, special_ids: frozenset[int]) -> str:
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
