"""Conversations of a corpus: which columns make them, which column holds the prompts, and the system message put in
front.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.corpus.files import Corpus, InputFile
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation, Message
from serve_app.reward_model.errors import ConversationError


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
        return Conversation.parse(Conversation((Message("system", text), *messages), conversation.reference))


NO_SYSTEM_PROMPT = SystemPrompt()


SCORE_COLUMNS = ("score", "num_tokens", "truncated", "error")


@dataclass(frozen=True, slots=True)
class ConversationColumns:
    """Either `messages`, or `prompt` and `response`, by column name; and `reference`, where one is named."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    reference: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """For a run's identity; without a reference it is that of the runs before there were any."""
        fields = asdict(self)
        return {name: column for name, column in fields.items() if name != "reference" or column is not None}

    @classmethod
    def detect(cls, schema: pa.Schema, chosen: ConversationColumns | None = None) -> ConversationColumns:
        """The columns to read: those `chosen`, else `messages`, else `prompt` and `response`.

        Raises:
            CorpusError: there are none, or both kinds, or one has the wrong type; the text lists the columns and flags.
        """
        chosen = chosen or cls()
        columns = replace(cls._by_name(schema, chosen), reference=chosen.reference)
        if columns.reference is not None:
            check_column(schema, columns.reference, "reference", text_or_messages=True)
        if columns.messages is not None:
            check_column(schema, columns.messages, "messages", text_or_messages=True)
        else:
            check_column(schema, str(columns.prompt), "prompt", text_or_messages=True)
            check_column(schema, str(columns.response), "response", text_or_messages=False)
        return columns

    @classmethod
    def _by_name(cls, schema: pa.Schema, chosen: ConversationColumns) -> ConversationColumns:
        if chosen.messages and (chosen.prompt or chosen.response):
            raise CorpusError("--messages-column excludes --prompt-column and --response-column")
        if chosen.messages:
            return chosen
        if chosen.prompt or chosen.response:
            return cls(prompt=chosen.prompt or "prompt", response=chosen.response or "response")
        has_messages = "messages" in schema.names
        has_pair = {"prompt", "response"} <= set(schema.names)
        if has_messages and has_pair:
            raise CorpusError(
                "the input has both 'messages' and 'prompt' with 'response'; say which to score with --messages-column "
                f"messages or --prompt-column prompt.\n{describe(schema)}"
            )
        if not has_messages and not has_pair:
            raise CorpusError(
                "the input has neither a 'messages' column nor 'prompt' and 'response'; name yours with "
                f"--messages-column, or with --prompt-column and --response-column.\n{describe(schema)}"
            )
        return cls(messages="messages") if has_messages else cls(prompt="prompt", response="response")


def check_column(schema: pa.Schema, name: str, role: str, *, text_or_messages: bool) -> None:
    """Refuse a column that is not there once, or holds neither text nor, where those are allowed, messages.

    Raises:
        CorpusError: the text lists the columns; `role` names the flag.
    """
    if schema.names.count(name) > 1:
        raise CorpusError(f"there are {schema.names.count(name)} columns {name!r}.\n{describe(schema)}")
    if name not in schema.names:
        raise CorpusError(f"there is no column {name!r} for --{role}-column.\n{describe(schema)}")
    kind = schema.field(name).type
    if not (is_text(kind) or (text_or_messages and is_messages(kind))):
        wanted = "a list of {role, content} or a JSON string of one" if role == "messages" else "a string"
        wanted = "a string or a list of {role, content}" if role in ("prompt", "reference") else wanted
        hint = "; rename 'from' to 'role' and 'value' to 'content'" if _is_sharegpt(kind) else ""
        raise CorpusError(f"column {name!r} is {kind}; --{role}-column takes {wanted}{hint}.\n{describe(schema)}")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):  # such as arrow.json
        kind = kind.storage_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in kinds)  # a column of nulls alone has the type null: each row is an error


def is_messages(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of {role, content}."""
    return {"role", "content"} <= _text_fields(kind)


def _is_sharegpt(kind: pa.DataType) -> bool:
    return {"from", "value"} <= _text_fields(kind)


def _text_fields(kind: pa.DataType) -> set[str]:
    """The names of the strings that a column of lists of structs holds; none for another column."""
    lists = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    if not any(is_list(kind) for is_list in lists) or not pa.types.is_struct(kind.value_type):
        return set()
    return {field.name for field in kind.value_type if is_text(field.type)}


def describe(schema: pa.Schema) -> str:
    """One line that lists the columns and their types, for errors."""
    return "Columns found: " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def columns_of(
    corpus: Corpus, chosen: ConversationColumns, *, output_prefix: str, system_prompt_column: str | None = None
) -> ConversationColumns:
    """The conversation columns, the same in every file, where there is room for the score columns too.

    Raises:
        CorpusError: a file has none, others than the file before it, or columns that the output cannot keep.
    """
    columns = conversation_columns(corpus, chosen)
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if system_prompt_column is not None:
            try:
                check_column(schema, system_prompt_column, "system-prompt", text_or_messages=False)
            except CorpusError as error:
                raise CorpusError(f"{file.path}: {error}") from None
        check_names(file, schema, [output_prefix + name for name in SCORE_COLUMNS])
    return columns


def conversation_columns(corpus: Corpus, chosen: ConversationColumns) -> ConversationColumns:
    """The conversation columns, the same in every file.

    Raises:
        CorpusError: a file has none, or others than the file before it.
    """
    found: dict[ConversationColumns, InputFile] = {}
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        try:
            found.setdefault(ConversationColumns.detect(schema, chosen), file)
        except CorpusError as error:
            raise CorpusError(f"{file.path}: {error}") from None
        if len(found) > 1:
            (first, one), (second, other) = found.items()
            raise CorpusError(
                f"{one.path} has its conversations in {first}, {other.path} in {second}; score them apart, or name "
                "the columns that all files have with --messages-column, or --prompt-column and --response-column"
            )
    return next(iter(found))


def check_names(file: InputFile, schema: pa.Schema, added: Sequence[str]) -> None:
    """Refuse a file that has several columns of one name, or one of a name that is to be `added`.

    Raises:
        CorpusError: it names the columns and the flag that makes room.
    """
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise CorpusError(f"{file.path} has several columns of the names {repeated}, which no output can keep")
    if taken := [name for name in added if name in schema.names]:
        raise CorpusError(
            f"{file.path} already has the columns {taken}; name the new ones apart with --output-prefix, such as "
            "--output-prefix second_"
        )


def conversations(
    table: pa.Table, columns: ConversationColumns, system_prompt: SystemPrompt = NO_SYSTEM_PROMPT
) -> list[Conversation | ConversationError]:
    """The conversation of each row, in order, or the reason why the row has none."""
    sources: Iterator[Any]
    if columns.messages is not None:
        sources = (_messages(cell) for cell in _cells(table, columns.messages))
    else:
        pairs = zip(_cells(table, str(columns.prompt)), _cells(table, str(columns.response)), strict=True)
        sources = (_joined(prompt, response) for prompt, response in pairs)
    prompts = _cells_or_none(table, system_prompt.column)
    rows = zip(sources, prompts, _cells_or_none(table, columns.reference), strict=True)
    return [_parse(source, system_prompt, cell, reference) for source, cell, reference in rows]


def prompts(table: pa.Table, columns: ConversationColumns) -> list[Conversation | ConversationError]:
    """The messages of each row's prompt, from its column of messages or of prompts, or why the row has none."""
    if columns.messages is not None:
        sources = [_messages(cell) for cell in _cells(table, columns.messages)]
    else:
        sources = [_prompt(cell) for cell in _cells(table, str(columns.prompt))]
    references = _cells_or_none(table, columns.reference)
    rows = zip(sources, references, strict=True)
    return [_answerable(_parse(source, NO_SYSTEM_PROMPT, None, reference)) for source, reference in rows]


def _answerable(prompt: Conversation | ConversationError) -> Conversation | ConversationError:
    if isinstance(prompt, Conversation) and prompt.response.role == "assistant":
        return ConversationError("the prompt ends in an assistant's turn, so there is nothing to answer")
    return prompt


def _cells(table: pa.Table, name: str) -> list[Any]:
    cells: list[Any] = table.column(name).to_pylist()
    return cells


def _cells_or_none(table: pa.Table, name: str | None) -> list[Any]:
    return [None] * table.num_rows if name is None else _cells(table, name)


def _parse(
    source: list[Any] | ConversationError, system_prompt: SystemPrompt, cell: Any, reference: Any
) -> Conversation | ConversationError:
    if isinstance(source, ConversationError):
        return source
    try:
        messages = [without_nulls(message) for message in source]
        if isinstance(reference, list):
            reference = [without_nulls(message) for message in reference]
        return system_prompt.before(Conversation.parse({"messages": messages, "reference": reference}), cell)
    except ConversationError as error:
        return error


def without_nulls(message: Any) -> Any:
    """A Parquet struct has every field in every row; one that is null was not there."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key in ("role", "content")}


def _messages(cell: Any) -> list[Any] | ConversationError:
    if cell is None:
        return ConversationError("the messages are null")
    if not isinstance(cell, str):
        return list(cell)
    try:
        parsed = json.loads(cell)
    except (ValueError, RecursionError) as error:
        return ConversationError(f"the messages are not JSON: {error}")
    return parsed if isinstance(parsed, list) else ConversationError("the JSON is not a list of messages")


def _joined(prompt: Any, response: Any) -> list[Any] | ConversationError:
    turns = _prompt(prompt)
    if isinstance(turns, ConversationError):
        return turns
    if response is None:
        return ConversationError("the response is null")
    return [*turns, {"role": "assistant", "content": response}]


def _prompt(cell: Any) -> list[Any] | ConversationError:
    if cell is None:
        return ConversationError("the prompt is null")
    return [{"role": "user", "content": cell}] if isinstance(cell, str) else list(cell)


def prompt_columns_of(
    corpus: Corpus, chosen: ConversationColumns, *, added: Sequence[str], system_prompt_column: str | None = None
) -> ConversationColumns:
    """The column of prompts (strings or messages) or of messages, the same in every file, with room for `added` ones.

    Raises:
        CorpusError: a file has none, another than the file before it, or columns that the output cannot keep.
    """
    found: dict[ConversationColumns, InputFile] = {}
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        try:
            found.setdefault(_detect(schema, chosen), file)
            if system_prompt_column is not None:
                check_column(schema, system_prompt_column, "system-prompt", text_or_messages=False)
        except CorpusError as error:
            raise CorpusError(f"{file.path}: {error}") from None
        if len(found) > 1:
            (first, one), (second, other) = found.items()
            raise CorpusError(
                f"{one.path} has its prompts in {first.messages or first.prompt!r}, {other.path} in "
                f"{second.messages or second.prompt!r}; answer them apart, or name a column that all files have with "
                "--messages-column or --prompt-column"
            )
        check_names(file, schema, added)
    return next(iter(found))


def _detect(schema: pa.Schema, chosen: ConversationColumns) -> ConversationColumns:
    if chosen.messages and chosen.prompt:
        raise CorpusError("--messages-column excludes --prompt-column")
    columns = chosen if chosen.messages or chosen.prompt else replace(_by_name(schema), reference=chosen.reference)
    if columns.reference is not None:
        check_column(schema, columns.reference, "reference", text_or_messages=True)
    role = "messages" if columns.messages else "prompt"
    check_column(schema, str(columns.messages or columns.prompt), role, text_or_messages=True)
    return columns


def _by_name(schema: pa.Schema) -> ConversationColumns:
    names = [name for name in ("messages", "prompt") if name in schema.names]
    if len(names) == 1:
        return ConversationColumns(**{names[0]: names[0]})
    if names:
        raise CorpusError(
            "the prompts have both 'messages' and 'prompt'; say which to answer with --messages-column messages or "
            f"--prompt-column prompt.\n{describe(schema)}"
        )
    raise CorpusError(
        "the prompts have neither a 'prompt' column nor 'messages'; name yours with --prompt-column or "
        f"--messages-column.\n{describe(schema)}"
    )
