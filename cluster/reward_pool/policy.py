"""A policy's answers, as padded or packed token ids or as text of its own tokenizer -> conversations, free of the
policy's template.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from datetime import date, timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.reward_pool.errors import PolicyTokenizerError, RewardInputError
from serve_app.reward_model import Conversation, ConversationError, Message, TokenIdsError
from serve_app.reward_model.markup import MARK, escape
from serve_app.reward_model.rendered_text import RenderedTextReader
from serve_app.reward_model.tokenizer import quiet_transformers


def unpadded(
    sequences: Tensor,
    attention_mask: Tensor | None = None,
    packed_seq_lens: Sequence[int] | Tensor | None = None,
    *,
    pad_sequence: bool = False,
) -> list[list[int]]:
    """The token ids of each sequence without its padding, in order. Shape legend: B sequences, T tokens.

    Args:
        sequences: integers [B, T]; packed ones end to end, [T] or [1, T].
        attention_mask: of the same shape, nonzero where a token counts: one run in each row, padding on either side.
            Without it every token counts.
        packed_seq_lens: the lengths of packed sequences.
        pad_sequence: whether a packed row has padding after the last sequence, as for ring attention.

    Raises:
        RewardInputError: a shape or dtype is wrong, the lengths do not add up, or a row's mask has a hole. The message
            names the row.
    """
    ids = _integers(sequences, "sequences")
    mask = (
        np.ones(ids.shape, dtype=bool) if attention_mask is None else _integers(attention_mask, "attention_mask") != 0
    )
    if mask.shape != ids.shape:
        raise RewardInputError(
            f"attention_mask is {list(mask.shape)} and sequences are {list(ids.shape)}; they go together"
        )
    if packed_seq_lens is not None:
        return _unpacked(ids, mask, [int(length) for length in packed_seq_lens], pad_sequence)
    if ids.ndim != 2:
        raise RewardInputError(f"sequences are [B, T], not {list(ids.shape)}; packed ones need packed_seq_lens")
    return [_kept(row, kept, place) for place, (row, kept) in enumerate(zip(ids, mask, strict=True))]


def _unpacked(ids: NDArray[Any], mask: NDArray[Any], lengths: list[int], pad_sequence: bool) -> list[list[int]]:
    if ids.ndim == 2 and len(ids) == 1:
        ids, mask = ids[0], mask[0]
    if ids.ndim != 1:
        raise RewardInputError(f"packed sequences are [T] or [1, T], not {list(ids.shape)}")
    total = sum(lengths)
    if min(lengths, default=1) < 1 or total > len(ids) or (total < len(ids) and not pad_sequence):
        raise RewardInputError(
            f"packed_seq_lens are positive and add up to {total}; there are {len(ids)} tokens"
            + ("" if pad_sequence else " (pad_sequence=True allows for padding after the last)")
        )
    starts = [0, *np.cumsum(lengths).tolist()]
    return [_kept(ids[start:stop], mask[start:stop], place) for place, (start, stop) in enumerate(pairwise(starts))]


def _kept(ids: NDArray[Any], mask: NDArray[Any], place: int) -> list[int]:
    places = np.flatnonzero(mask)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise RewardInputError(
            f"row {place} of attention_mask has a hole: the tokens of a sequence are one run, with padding around it"
        )
    kept: list[int] = ids[places].tolist()
    return kept


def _integers(tensor: Tensor, name: str) -> NDArray[Any]:
    if not isinstance(tensor, Tensor):
        raise RewardInputError(f"{name} is a tensor, not {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex():
        raise RewardInputError(f"{name} holds integers, not {str(tensor.dtype).removeprefix('torch.')}")
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


THINK, END_THINK = "<think>", "</think>"
# Markers, as in `markup.py`: MARK + "0" stands inside what only spells a special token, MARK + "2" inside the end of a
# thought, at which templates cut older answers, and MARK + "3" around contents that they would trim.
SPELLED, HIDDEN, FENCE = MARK + "0", MARK + "2", MARK + "3"
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
HIDDEN_END = END_THINK[:2] + HIDDEN + END_THINK[2:]


def without_thinking(text: str) -> str:
    """A response without its `<think>` block: what follows the last `</think>`, or nothing if the block has no end.

    The start may be missing, as where the template writes it in front of the response.
    """
    _, ended, answer = text.rpartition(END_THINK)
    if ended:
        return answer.lstrip()
    return "" if text.lstrip().startswith(THINK) else text


def template_of_day(template: str, day: date) -> str:
    """A chat template that writes `day` where it would write today's date."""
    return DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), template)


class PolicyText:
    """Reads one policy's sequences. `tokenizer` is its fast tokenizer from Transformers.

    `keep_default_system` leaves the system prompt in that the policy's chat template writes unasked; a prompt that has
    the same words of its own cannot be told from it.
    """

    def __init__(self, tokenizer: Any, *, keep_default_system: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PolicyTokenizerError(
                f"policy_tokenizer is a fast tokenizer from Transformers, a folder or a Hugging Face id, not "
                f"{type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._keep_default_system = keep_default_system
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._specials = {key: token.content for key, token in added.items() if token.special and token.content}
        longest_first = sorted(set(self._specials.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._num_ids = len(tokenizer)
        template = tokenizer.chat_template
        self._writes_date = isinstance(template, str) and DATE_CALL.search(template) is not None
        self._readers: dict[date, RenderedTextReader] = {}
        self._default_system = self._found_default_system()

    @classmethod
    def from_pretrained(cls, tokenizer: Any, *, keep_default_system: bool = False) -> PolicyText:
        """For a folder, a Hugging Face id or a tokenizer. No code from a model's repository is ever run.

        Raises:
            PolicyTokenizerError: it cannot be read, or has no fast form.
        """
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            try:
                with quiet_transformers():
                    tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            except Exception as error:  # Transformers raises many types for a missing or broken tokenizer
                raise PolicyTokenizerError(f"policy_tokenizer {tokenizer!r} cannot be read: {error}") from error
        return cls(tokenizer, keep_default_system=keep_default_system)

    def of_ids(self, sequences: Sequence[Sequence[int]]) -> list[Conversation | ConversationError | TokenIdsError]:
        """Each sequence of the policy's ids as a conversation, in order, or what is wrong with that one."""
        found: list[Conversation | ConversationError | TokenIdsError] = []
        for ids in sequences:
            try:
                found.append(self._read(self._decoded(ids)))
            except (ConversationError, TokenIdsError) as error:
                found.append(error)
        return found

    def of_text(self, text: str, *, prompt: str | None = None) -> Conversation:
        """The conversation that `text`, decoded with the policy's special tokens, was rendered from.

        `prompt` is what `text` begins with, up to the answer, where that is known.

        Raises:
            ConversationError: it has no format that `rendered_text.py` reads, nor the policy's template, or it ends
                before a response.
        """
        return self._read(escape(text), prompt=None if prompt is None else escape(prompt))

    def _decoded(self, ids: Sequence[int]) -> str:
        """The text of `ids`, escaped; a marker stands in what a message only spells like a special token."""
        if not ids:
            raise TokenIdsError("the sequence is empty: its attention mask keeps no token")
        wrong = min(ids) if min(ids) < 0 else max(ids)
        if not 0 <= wrong < self._num_ids:
            raise TokenIdsError(
                f"token id {wrong} is outside the policy tokenizer's {self._num_ids}; is policy_tokenizer the policy's?"
            )
        text = self._decode(ids)
        specials = [self._specials[token] for token in ids if token in self._specials]
        if self._pattern.findall(text) == specials:
            return escape(text)
        pieces: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._specials:
                pieces += [self._spelled(run), self._specials[token]]
                run = []
            else:
                run.append(token)
        return "".join([*pieces, self._spelled(run)])

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _spelled(self, run: Sequence[int]) -> str:
        """The text of ordinary tokens, what spells a special one in it marked."""
        text = escape(self._decode(run)) if run else ""
        return self._pattern.sub(lambda match: match[0][:1] + SPELLED + match[0][1:], text)

    def _read(self, text: str, *, prompt: str | None = None) -> Conversation:
        messages = [_unmarked(message) for message in self._parsed(text, prompt).messages]
        if messages[-1].role in ("user", "system"):
            raise ConversationError(f"the text ends in a turn of {messages[-1].role!r}: it has no response to score")
        if not self._keep_default_system and messages[0].role == "system" and len(messages) > 1:
            default = self._default_system
            if default is not None and messages[0].content.strip() == default.strip():
                messages = messages[1:]
        return Conversation.parse(messages)

    def _parsed(self, text: str, prompt: str | None) -> Conversation:
        """By the template; by one that writes the date as of today, or of a day beside it: midnight and time zones."""
        hidden = text.replace(END_THINK, HIDDEN_END)
        front = None if prompt is None else prompt.replace(END_THINK, HIDDEN_END)
        today = date.today()
        for days in (0, -1, 1) if self._writes_date else ():
            with contextlib.suppress(ConversationError):
                return self._reader_of(today + timedelta(days=days)).read(hidden, prompt=front)
        return self._reader_of(today).read(hidden, prompt=front)

    def _reader_of(self, day: date) -> RenderedTextReader:
        """The reader of what the template writes on a day; one that writes no date has one reader."""
        key = day if self._writes_date else date.min
        if key not in self._readers:
            tokenizer = self._tokenizer
            framing = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
            self._readers[key] = RenderedTextReader(
                partial(self._render, day=day),
                special_tokens=set(self._specials.values()),
                framing=[text for text in framing if text],
            )
        return self._readers[key]

    def _found_default_system(self) -> str | None:
        """The system prompt that the template writes where a prompt has none, if that reads as a turn of its own."""
        today = date.today()
        try:
            asked = self._reader_of(today).read(self._render([Message("user", "Qz0zQ")], day=today))
        except ConversationError:  # no template, or one that is not recognised: ChatML is read all the same
            return None
        return asked.messages[0].content if asked.messages[0].role == "system" else None

    def _render(self, messages: Sequence[Message], *, day: date) -> str:
        """The template's text of contents as they are, though it may trim them: a response may begin with a space."""
        chat = [{"role": message.role, "content": _fenced(message.content)} for message in messages]
        try:
            template = template_of_day(self._tokenizer.chat_template, day) if self._writes_date else None
            text: str = self._tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except Exception as error:  # a template may refuse roles or orders with any exception it likes
            raise ConversationError(f"the policy's chat template refuses the conversation: {error}") from error
        return text.replace(FENCE, "")


def _fenced(content: str) -> str:
    return content if content == content.strip() else FENCE + content + FENCE


def _unmarked(message: Message) -> Message:
    def text(marked: str) -> str:
        return marked.replace(SPELLED, "").replace(HIDDEN, "").replace(MARK + "1", MARK)

    return Message(text(message.role), text(message.content))
