"""Prompts as the token ids that a causal model continues, through the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.reward_model.conversation import Message
from serve_app.reward_model.errors import CheckpointError, ConversationError
from serve_app.reward_model.markup import MARK, MarkedTextEncoder, Markup, escape
from serve_app.reward_model.tokenizer import fast_tokenizer

PROBE = "rayward"


class ChatEncoder:
    """A generator's chat template and vocabulary. What a message spells never becomes a special token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._markup = Markup.of(self._backend)
        self._marked = MarkedTextEncoder(self._backend, self._markup)

    @classmethod
    def from_pretrained(cls, folder: Path) -> ChatEncoder:
        """Read the tokenizer of the checkpoint in `folder`; code in the folder is never run.

        Raises:
            CheckpointError: there is no tokenizer, it has no fast form, or it has no chat template.
        """
        tokenizer = fast_tokenizer(folder)
        if not tokenizer.chat_template:
            raise CheckpointError(
                f"the tokenizer in {folder} has no chat template, so prompts have no text form; a generator is a chat "
                "model, or a folder to which a chat_template.jinja was added"
            )
        return cls(tokenizer)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant's turn begins, with one BOS where the model has one.

        Raises:
            ConversationError: the template refuses the messages, or renders them as nothing.
        """
        ids = self._framed(self._ids(self._render(messages, opens_turn=True)))
        if not ids:
            raise ConversationError("the generator's chat template renders the prompt as empty text")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def end_of_turn_ids(self) -> set[int]:
        """Special tokens that the template writes right after an assistant's message, such as <|im_end|>.

        Not every checkpoint lists them among those that end a generation; one that does not would go on for ever,
        speaking for the user.
        """
        question = Message("user", PROBE)
        try:
            opened = self._render([question], opens_turn=True)
            closed = self._render([question, Message("assistant", PROBE)], opens_turn=False)
        except ConversationError:
            return set()
        rest = closed.removeprefix(opened + PROBE)
        if len(rest) == len(closed):  # the template writes a finished turn in another way than an open one
            rest = closed.rpartition(PROBE)[2]
        return set(self._ids(rest.lstrip())[:1]) & set(self._markup.ids)

    @property
    def eos_token_id(self) -> int | None:
        token: int | None = self._tokenizer.eos_token_id
        return token

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = (
            self._marked.encode(text) if MARK in text else self._backend.encode(text, add_special_tokens=False).ids
        )
        return ids

    def _framed(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        start = next((place for place, token in enumerate(ids) if token != bos), len(ids))
        return [bos, *ids[start:]] if start > 1 else ids

    def _render(self, messages: Sequence[Message], *, opens_turn: bool) -> str:
        texts = [(message.role, message.content) for message in messages]
        spelled = any(self._markup.is_spelled(text) for pair in texts for text in pair)
        if spelled:
            mark = self._markup.mark_if_spelled
            texts = [(mark(role), mark(content)) for role, content in texts]
        chat = [{"role": role, "content": content} for role, content in texts]
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens_turn)
        except Exception as error:  # a template may refuse roles or orders with any exception it likes
            raise ConversationError(f"the generator's chat template refuses the prompt: {error}") from error
        return text if spelled or MARK not in text else escape(text)
