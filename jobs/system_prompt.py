"""The system message that conditions a reward model on a domain (InternLM2 report, arXiv:2403.17297, figure 8)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError

__all__ = ["NO_SYSTEM_PROMPT", "SystemPrompt"]


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """A system message for every row (`text`), or the one that a `column` holds; `replaces` one that is there."""

    text: str | None = None
    column: str | None = None
    replaces: bool = False

    @classmethod
    def of(cls, text: str | None, column: str | None, *, replaces: bool) -> SystemPrompt:
        """From the command line, where `@FILE` names a file that holds the text.

        Raises:
            CorpusError: both are given, the text is empty, or the file cannot be read.
        """
        if text is not None and column is not None:
            raise CorpusError("--system-prompt excludes --system-prompt-column")
        if replaces and text is None and column is None:
            raise CorpusError("--replace-system-prompt needs --system-prompt or --system-prompt-column")
        if text is not None and text.startswith("@"):
            try:
                text = Path(text[1:]).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise CorpusError(f"--system-prompt {text}: {error}") from error
        if text is not None and not text:
            raise CorpusError("--system-prompt is empty; leave it out for none")
        return cls(text, column, replaces)

    def before(self, conversation: Conversation, cell: Any) -> Conversation:
        """The conversation with its system message in front; `cell` is the row's value of the column.

        Raises:
            ConversationError: it has one already and none is to be replaced, or the cell is no text.
        """
        text = self.text if self.column is None else cell
        if text is None:
            return conversation
        if not isinstance(text, str):
            raise ConversationError(f"the system prompt is {type(text).__name__}, not a string")
        messages = conversation.messages
        if messages[0].role == "system":
            if not self.replaces:
                raise ConversationError("there is a system message already; --replace-system-prompt replaces it")
            messages = messages[1:]
        return Conversation.parse([Message("system", text), *messages])


NO_SYSTEM_PROMPT = SystemPrompt()
