"""Conversation -> token ids, through the checkpoint's own chat template. Next stop: `packing.py`.

The ids are those of the reference pipelines (RewardBench, POLAR's client): the rendered text, encoded with the special
tokens that the tokenizer itself puts around a text, and none of them doubled. So of the four cases

- the tokenizer adds a BOS and the template writes one: there is one;
- the tokenizer adds one, the template writes none: there is one;
- the tokenizer adds none, the template writes one: there is one;
- the tokenizer adds none, the template writes none: there is none, even if the tokenizer names a `bos_token`.

An EOS that the tokenizer adds at the end follows the same rule. Where the model has a reward token, the ids end in it,
once, and in nothing else. Text inside messages never becomes a special token (`markup.py`).
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenizers import Tokenizer as BackendTokenizer

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.chat_template import checked_template
from serve_app.reward_model.conversation import Conversation, ConversationLike, Message, warnings_of
from serve_app.reward_model.errors import (
    CheckpointError,
    ConversationError,
    ConversationTooLongError,
    MalformedConversationError,
    ScoringError,
    TokenIdsError,
)
from serve_app.reward_model.families import TEMPLATED_RULES
from serve_app.reward_model.markup import MARK, MarkedTextEncoder, Markup, escape
from serve_app.reward_model.polar import SEPARATOR, read_polar, render_polar
from serve_app.reward_model.rendered_text import RenderedTextReader
from serve_app.reward_model.scores import Outputs, Score

# What Llama 3's templates write where no date is given: with today's date a score would change by the day.
DATE = "26 Jul 2024"

# The files that a fast tokenizer is read or made from.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")

Truncation: TypeAlias = Literal["error", "right", "left"]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Token ids of one conversation, ready to be scored, and whether they were shortened to fit.

    `warnings` say what looks wrong in it: see `conversation.warnings_of`.
    """

    token_ids: list[int]
    truncated: bool = False
    warnings: tuple[str, ...] = ()

    def scored(self, outputs: Outputs | ScoringError, names: Sequence[str]) -> Score | ScoringError:
        """What `outputs` of these ids make of the conversation; `names` are those of the model's attributes."""
        if isinstance(outputs, ScoringError):
            return outputs
        attributes = dict(zip(names, outputs[1:], strict=True))
        return Score(outputs[0], len(self.token_ids), self.truncated, self.warnings, attributes)


class Tokenizer:
    """A checkpoint's chat template and vocabulary.

    Args:
        tokenizer: the fast tokenizer that `AutoTokenizer` made of the checkpoint.
        reward_token_id: the id every sequence ends in, or None where the score is read at the template's last token.
        max_tokens: the model's longest sequence, in tokens.
        ends_in_eos: whether every text ends in the eos token, trailing newlines stripped, as OpenRLHF has it.
        scores_steps: whether the model scores the steps of answers, which `steps.py` encodes, and no conversations.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        reward_token_id: int | None,
        max_tokens: int,
        ends_in_eos: bool = False,
        scores_steps: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._backend: BackendTokenizer = tokenizer.backend_tokenizer
        # A saved tokenizer may carry a trainer's truncation and padding, which would change ids in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._markup = Markup.of(self._backend)
        self._front, self._end = _added_tokens(self._backend)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.reward_token_id = reward_token_id
        self._eos: str | None = tokenizer.eos_token if ends_in_eos else None
        self._end_id: int | None = tokenizer.eos_token_id if ends_in_eos else reward_token_id
        self.max_tokens = max_tokens
        self.scores_steps = scores_steps
        self.takes_reference = _is_polar(self._backend, reward_token_id)
        """Whether conversations need a `reference`, which the response is compared with: POLAR's models do."""

    @classmethod
    def from_pretrained(cls, folder: Path, *, config: DecoderConfig, chat_template: str | None = None) -> Tokenizer:
        """Read the tokenizer of the checkpoint in `folder`; code in the folder is never run.

        Args:
            folder: the checkpoint's.
            config: its shape.
            chat_template: the text of a Jinja template in place of the checkpoint's; it is rendered in a sandbox.

        Raises:
            CheckpointError: there is no tokenizer, it has no fast form, or it has no chat template that renders.
        """
        tokenizer = fast_tokenizer(folder)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        ends_in_eos = config.reading == "eos"
        if ends_in_eos and not tokenizer.eos_token:
            raise CheckpointError(
                f"{config.architecture} is read at the eos token, and the tokenizer in {folder} has none"
            )
        made = cls(
            tokenizer,
            reward_token_id=config.reward_token_id,
            max_tokens=config.max_tokens,
            ends_in_eos=ends_in_eos,
            scores_steps=config.head.steps is not None,
        )
        if config.head.steps is not None and config.head.steps not in TEMPLATED_RULES:
            if chat_template is not None:
                raise CheckpointError(f"{folder} reads a question and steps as they are: leave chat_template out")
        elif not made.takes_reference:
            tokenizer.chat_template = checked_template(tokenizer, folder, is_given=chat_template is not None, date=DATE)
        elif chat_template is not None:
            raise CheckpointError(f"{folder} is a POLAR model, which reads no chat template: leave chat_template out")
        return made

    @cached_property
    def _marked(self) -> MarkedTextEncoder:
        return MarkedTextEncoder(self._backend, self._markup)

    @cached_property
    def _reader(self) -> RenderedTextReader:
        special = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        named = [self._tokenizer.bos_token, self._tokenizer.eos_token, self._tokenizer.pad_token]
        if self.reward_token_id is not None:
            named.append(self._backend.id_to_token(self.reward_token_id))
        return RenderedTextReader(
            lambda messages: self._apply_template([(message.role, message.content) for message in messages], None),
            special_tokens=special,
            framing=[text for text in named if text],
        )

    def read_rendered(self, text: str, *, prompt: str | None = None) -> Conversation:
        """The conversation that a text was rendered from, by a known format or this model's chat template.

        `prompt` is what the text begins with, up to the answer, where that is known. For POLAR's models the text is
        the one that its client renders, whatever `prompt` is: see `polar.py`.

        Raises:
            RenderedTextError: it has no format that is read: see `rendered_text.py`.
        """
        if self.takes_reference:
            return read_polar(text)
        return self._reader.read(text, prompt=prompt)

    def encode(
        self, conversation: ConversationLike, *, truncation: Truncation = "error", max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of one conversation; see `encode_batch`, whose error for this conversation is raised here."""
        encoded = self.encode_batch([conversation], truncation=truncation, max_tokens=max_tokens)[0]
        if isinstance(encoded, ScoringError):
            raise encoded
        return encoded.token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, with the special tokens in it: for showing what a model reads."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text that a client sent as token ids.

        Raises:
            TokenIdsError: there is none, or the vocabulary has no such id.
        """
        if not token_ids:
            raise TokenIdsError("the list of token ids is empty")
        for token in token_ids:
            if not 0 <= token < 2**31 or self._backend.id_to_token(token) is None:
                raise TokenIdsError(f"token id {token} is not in the reward model's vocabulary")
        return self.decode(token_ids)

    def encode_batch(
        self,
        conversations: Sequence[ConversationLike | ConversationError],
        *,
        truncation: Truncation = "error",
        max_tokens: int | None = None,
        strict: bool = False,
    ) -> list[EncodedConversation | ScoringError]:
        """Token ids of each conversation, in order, or the error that keeps it from being scored.

        Args:
            conversations: what to encode; an error in place of one comes back as it is.
            truncation: what to do with a conversation over the limit. `"error"`: a `ConversationTooLongError`.
                `"right"`: keep the start. `"left"`: drop the oldest whole turns, a user's message and what
                follows it up to the next user's message, then the oldest tokens before the last response; a system
                message in front stays while turns are dropped. BOS, the last response and the reward token stay, and
                so does an EOS that the tokenizer adds.
            max_tokens: a limit below the model's own.
            strict: what `warnings_of` finds in a conversation is a `MalformedConversationError`, and no warning.
        """
        limit = self._limit(max_tokens)
        if truncation not in ("error", "right", "left"):
            raise ValueError(f"truncation is 'error', 'right' or 'left', not {truncation!r}")
        results: list[EncodedConversation | ScoringError] = [ConversationError("not encoded")] * len(conversations)
        parsed: dict[int, Conversation] = {}
        rendered: dict[int, str] = {}
        for index, source in enumerate(conversations):
            try:
                if isinstance(source, ConversationError):
                    raise source
                if self.scores_steps:
                    raise ConversationError(
                        "this model scores the steps of an answer, and no conversation as a whole: use score_steps "
                        "(--steps-column in jobs, /v1/steps over HTTP)"
                    )
                conversation = Conversation.parse(source)
                if strict and (found := warnings_of(conversation)):
                    raise MalformedConversationError("; ".join(found))
                rendered[index] = self._render(conversation.messages, conversation.reference)
                parsed[index] = conversation
            except ScoringError as error:
                results[index] = error
        for index, ids in zip(rendered, self._encode_texts(list(rendered.values())), strict=True):
            try:
                results[index] = self._fit(parsed[index], ids, limit=limit, truncation=truncation)
            except ScoringError as error:
                results[index] = error
        return results

    def id_of(self, token: str) -> int | None:
        """The id of a token that the vocabulary has by this name."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def plain_ids(self, text: str) -> list[int]:
        """The ids of a text by itself, with nothing around it; special tokens that it spells stay text."""
        if self._markup.is_spelled(text):
            return self._marked.encode(self._markup.mark(text))
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def framed_ids(self, text: str) -> list[int]:
        """The ids of a text with the special tokens that the tokenizer puts around one; those it spells stay text."""
        return self._frame(self.plain_ids(text))

    def rendered_ids(
        self, messages: Sequence[Message], *, pieces: Sequence[str] = (), separator: str = ""
    ) -> list[int]:
        """The ids of messages by the chat template. With `pieces` the last one's content is these, with the token
        `separator` behind each: the same typed in a piece stays text.
        """
        if not pieces:
            return self._encode_texts([self._render(messages)])[0]
        texts = [(message.role, self._markup.mark_if_spelled(message.content)) for message in messages[:-1]]
        content = "".join(self._markup.mark_if_spelled(piece) + separator for piece in pieces)
        return self._encode_texts([self._apply_template([*texts, (messages[-1].role, content)], None)])[0]

    def _limit(self, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self.max_tokens
        if max_tokens < 2:
            raise ValueError(f"max_tokens is at least 2 (BOS and the reward token), not {max_tokens}")
        return min(max_tokens, self.max_tokens)

    def _render(self, messages: Sequence[Message], reference: str | None = None) -> str:
        """The template's text; MARK is in it only where a message spells a special token."""
        texts = [(message.role, message.content) for message in messages]
        typed = [text for pair in texts for text in pair] + ([] if reference is None else [reference])
        spelled = any(map(self._markup.is_spelled, typed))
        if spelled:
            # Only what spells one: templates compare roles, and look into contents.
            texts = [
                (self._markup.mark_if_spelled(role), self._markup.mark_if_spelled(content)) for role, content in texts
            ]
            reference = None if reference is None else self._markup.mark_if_spelled(reference)
        text = self._apply_template(texts, reference)
        return text if spelled or MARK not in text else escape(text)

    def _apply_template(self, texts: Sequence[tuple[str, str]], reference: str | None) -> str:
        if self.takes_reference:
            return render_polar([content for _, content in texts], reference)
        if reference is not None:
            raise ConversationError("this model takes no reference; POLAR's models alone compare a response with one")
        chat = [{"role": role, "content": content} for role, content in texts]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, date_string=DATE)
        except Exception as error:  # a template may refuse roles or orders with any exception it likes
            raise ConversationError(f"the model's chat template refuses the conversation: {error}") from error
        return text

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts, each with the special tokens around it that the module names."""
        if self._eos is not None:
            texts = [_ended(text, self._eos) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self._frame(self._marked.encode(text) if MARK in text else encoding.ids)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _frame(self, ids: list[int]) -> list[int]:
        front, end, bos, reward = self._front, self._end, self.bos_token_id, self.reward_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[next((place for place, token in enumerate(ids) if token != bos), len(ids)) - 1 :]
        if front and ids[: len(front)] != front:
            ids = [*front, *(ids[1:] if bos in front and ids[:1] == [bos] else ids)]
        if reward is not None:
            stop = len(ids)
            while stop and ids[stop - 1] == reward:
                stop -= 1
            ids = [*ids[:stop], reward]
        elif end and ids[-len(end) :] != end:
            ids = [*ids, *end]
        return ids

    def _fit(
        self, conversation: Conversation, ids: list[int], *, limit: int, truncation: Truncation
    ) -> EncodedConversation:
        found = warnings_of(conversation)
        if not ids:
            raise ConversationError("the chat template renders the conversation as empty text")
        if len(ids) <= limit:
            return EncodedConversation(ids, warnings=found)
        if truncation == "error":
            raise ConversationTooLongError(len(ids), limit)
        if truncation == "right":
            return EncodedConversation(self._keep_start(ids, limit), truncated=True, warnings=found)
        return EncodedConversation(self._drop_oldest(conversation, ids, limit), truncated=True, warnings=found)

    def _keep_start(self, ids: list[int], limit: int) -> list[int]:
        end = self._end if self._end and ids[-len(self._end) :] == self._end else []
        if self._end_id is not None:
            end = [self._end_id]
        kept = ids[: max(0, limit - len(end))]
        if self.takes_reference and self._backend.token_to_id(SEPARATOR) not in kept:
            detail = "prompt and reference alone do not fit, so nothing of the response would be read"
            raise ConversationTooLongError(len(ids), limit, detail)
        return kept + end

    def _drop_oldest(self, conversation: Conversation, ids: list[int], limit: int) -> list[int]:
        num_tokens = len(ids)
        messages: Sequence[Message] = conversation.messages
        shorter = _without_oldest_turns(messages)
        low, high = 0, len(shorter)  # more turns dropped, fewer tokens: the first that fits is found by halving
        fitting = None
        while low < high:
            middle = (low + high) // 2
            candidate = self._encode_texts([self._render(shorter[middle], conversation.reference)])[0]
            if len(candidate) <= limit:
                high, fitting = middle, candidate
            else:
                low = middle + 1
        if fitting is not None:
            return fitting
        if self.takes_reference:
            detail = "truncation='left' drops whole turns of a prompt that POLAR reads twice, and no part of one"
            raise ConversationTooLongError(num_tokens, limit, detail)
        if shorter:
            messages = shorter[-1]
            ids = self._encode_texts([self._render(messages)])[0]
        head = self._head_of(ids)
        response_ids = ids[self._prompt_length(messages, ids) :]
        room = limit - len(head) - len(response_ids)
        if room < 0:
            detail = f"the last response alone has {len(response_ids)} and truncation='left' does not cut it"
            raise ConversationTooLongError(num_tokens, limit, detail)
        prompt_ids = ids[len(head) : len(ids) - len(response_ids)]
        return head + prompt_ids[len(prompt_ids) - room :] + response_ids

    def _head_of(self, ids: list[int]) -> list[int]:
        """The special tokens in front of the text: what the tokenizer adds, or the BOS that the template wrote."""
        if self._front:
            return self._front
        return ids[:1] if self.bos_token_id is not None and ids[:1] == [self.bos_token_id] else []

    def _prompt_length(self, messages: Sequence[Message], ids: list[int]) -> int:
        """How many of `ids` stand before the last message: those its prompt alone is encoded to.

        A template may refuse the prompt alone, as one that wants an assistant's message last; then it ends where the
        content of the message before the last one does.
        """
        if len(messages) == 1:
            return len(self._head_of(ids))
        try:
            prompt = self._render(messages[:-1])
        except ConversationError:
            prompt = self._text_before_last(messages)
        prompt_ids = self._encode_texts([prompt])[0]
        pairs = zip(prompt_ids, ids, strict=False)
        return next((place for place, (ours, full) in enumerate(pairs) if ours != full), len(prompt_ids))

    def _text_before_last(self, messages: Sequence[Message]) -> str:
        """The rendered text up to the end of the last but one message's content.

        Where the last content begins shows by rendering another one in its place.
        """
        *before, last = messages
        text = self._render(messages)
        other = self._render([*before, Message(last.role, "b" if last.content.strip()[:1] == "a" else "a")])
        start = next((at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), len(text))
        content = before[-1].content
        content = (self._markup.mark_if_spelled(content) if MARK in text else content).strip()
        at = text.rfind(content, 0, start) if content else -1
        return text[: start if at < 0 else at + len(content)]


def _added_tokens(backend: BackendTokenizer) -> tuple[list[int], list[int]]:
    """The ids of the special tokens that a tokenizer puts before and after a text that it encodes."""
    encoding = backend.encode("a", add_special_tokens=True)
    ids, is_added = encoding.ids, encoding.special_tokens_mask
    first = next((place for place, added in enumerate(is_added) if not added), len(ids))
    last = next((place for place in range(len(ids), first, -1) if not is_added[place - 1]), first)
    return ids[:first], ids[last:]


def _is_polar(backend: BackendTokenizer, reward_token_id: int | None) -> bool:
    """Whether a checkpoint is one of POLAR's.

    They have the architecture of InternLM2-Reward and its reward token, 92527. But that is `[UNUSED_TOKEN_130]` there,
    and `<|reward|>` another token, which stands between the reference and the response.
    """
    if reward_token_id is None:
        return False
    separators = [id_ for id_, token in backend.get_added_tokens_decoder().items() if token.content == SEPARATOR]
    return bool(separators) and reward_token_id not in separators


def _ended(text: str, eos: str) -> str:
    """The text as OpenRLHF's `datasets/reward_dataset.py` ends it, a space before an eos token that it adds."""
    stripped = text.rstrip("\n")
    return stripped if stripped.endswith(eos) else f"{stripped} {eos}"


def _without_oldest_turns(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """Ever shorter conversations: the same system message, then from a later user's message on."""
    first = 1 if messages[0].role == "system" else 0
    starts = [place for place in range(first + 1, len(messages) - 1) if messages[place].role == "user"]
    return [(*messages[:first], *messages[start:]) for start in starts]


# Filters and levels belong to the process: two threads that set them and put them back would leave them changed.
_QUIET = threading.Lock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back what Transformers says of a model type it does not know: only its tokenizer is used here."""
    logger = logging.getLogger("transformers")
    with _QUIET, warnings.catch_warnings():
        level = logger.level
        logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _first_broken(folder: Path) -> Path | None:
    """The first of a tokenizer's files that is no JSON; None where each is."""
    for path in sorted({*folder.glob("*token*.json"), *folder.glob("vocab.json")}):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return path
    return None


def fast_tokenizer(folder: Path) -> Any:
    """The Transformers tokenizer of the checkpoint in `folder`, in its fast form; code in the folder is never run.

    Raises:
        CheckpointError: there is no tokenizer, or it has no fast form.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} holds no tokenizer.json, nor a vocabulary to make one from ({', '.join(VOCABULARIES[1:])}): "
            "copy the tokenizer's files from the model's repository"
        )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers raises many types for a missing or broken tokenizer
        broken = _first_broken(folder)
        raise CheckpointError(f"no tokenizer could be read from {broken or folder}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"the tokenizer in {folder} has no fast (tokenizers) form, which rayward needs")
    return tokenizer
