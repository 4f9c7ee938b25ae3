"""Chat templates: where one comes from, and whether it can be used, before any conversation is rendered.

Transformers renders them in Jinja's sandbox: a template is text, and runs no code of its repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.reward_model.errors import CheckpointError

PROBES = (("user", "assistant"), ("user",), ("system", "user", "assistant"))
"""Roles of conversations of which a template must render at least one."""


def template_text(source: str | Path) -> str:
    """The text of a chat template: `source` itself where it is one, else that of the file it names.

    A string is a template if there is a brace in it, as there is in every one that writes a message.

    Raises:
        CheckpointError: the file cannot be read, or holds no template.
    """
    if isinstance(source, str) and "{" in source:
        return source
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no chat template file {path}: name a file with a Jinja template in it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template file {path} cannot be read: {error}") from error
    if "{" not in text:
        raise CheckpointError(f"the chat template file {path} holds no Jinja template: it writes no message")
    return text


def checked_template(tokenizer: Any, folder: Path, *, is_given: bool, date: str) -> str:
    """The text of the template that `tokenizer` renders conversations with; of several named ones, the default.

    Args:
        tokenizer: the checkpoint's, as Transformers read it.
        folder: the checkpoint's.
        is_given: whether the caller gave the template, in place of the checkpoint's.
        date: the one that a template gets that takes a date.

    Raises:
        CheckpointError: there is none, it writes the date of the day, or it renders no conversation.
    """
    where = "the chat template that was given" if is_given else f"the chat template in {_file_of(folder)}"
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"the tokenizer in {folder} has no chat template, so conversations have no text form; name the file of "
            "the one that the model was trained with: --chat-template FILE, or chat_template= in Python"
        )
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # of several named templates none is the default
        raise CheckpointError(
            f"{where}: {error}; name the file of the right one with --chat-template or chat_template="
        ) from error
    if "strftime_now" in template and "date_string" not in template:
        raise CheckpointError(
            f"{where} writes today's date, so scores would change by the day; give one with the date of the training "
            "in its place: --chat-template FILE, or chat_template= in Python"
        )
    failures = [_failure(tokenizer, template, roles, date) for roles in PROBES]
    if all(failure is not None for failure in failures):
        raise CheckpointError(
            f"{where} renders no conversation, not even of a user and an assistant: {failures[0]}; give one that does "
            "with --chat-template FILE, or chat_template= in Python"
        )
    return template


def _file_of(folder: Path) -> Path:
    """The file that holds a checkpoint's template."""
    jinja = folder / "chat_template.jinja"
    return jinja if jinja.is_file() else folder / "tokenizer_config.json"


def _failure(tokenizer: Any, template: str, roles: tuple[str, ...], date: str) -> str | None:
    chat = [{"role": role, "content": "text"} for role in roles]
    try:
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, date_string=date)
    except Exception as error:  # Jinja's own errors, and whatever a template does
        return f"{type(error).__name__}: {error}"
    return None
