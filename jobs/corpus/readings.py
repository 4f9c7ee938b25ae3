"""Readings of a corpus: which of its columns hold conversations, pairs, candidates or prompts. Rows that could be
read in two ways are refused, with an example of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

import pyarrow as pa

from jobs.corpus.candidates import CandidateColumns, are_candidates, candidate_rows, hold_messages
from jobs.corpus.conversations import (
    ConversationColumns,
    check_column,
    conversations,
    describe,
    is_messages,
    is_sharegpt,
    is_text,
    prompts,
)
from jobs.corpus.files import Corpus, InputFile
from jobs.corpus.preferences import PreferenceColumns, preference_pairs
from jobs.corpus.reader import UnitReader
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError

Reading: TypeAlias = ConversationColumns | PreferenceColumns | CandidateColumns
"""What a row is read as: one conversation, or two or more that share a prompt."""
ReadingName: TypeAlias = Literal["conversations", "pairs", "candidates"]
ReadingT = TypeVar("ReadingT", bound=Reading)

MESSAGES_NAMES = ("messages", "conversations", "conversation")
"""Names of the column of messages: ShareGPT has `conversations`, LMSYS-Chat-1M `conversation`."""
RESPONSES_NAMES = ("responses", "completions", "answers")
PROMPT_NAMES = ("prompt", "instruction")
"""Names of the prompt beside a response, or beside several: UltraFeedback has `instruction`."""
PARTS_OF_INSTRUCTION = ("input", "context", "history", "system")
"""What stands beside an `instruction` that is not the whole prompt, as in Alpaca, Dolly and LLaMA-Factory's files."""
SHOWN_TURNS, SHOWN_CHARS, SHOWN_CANDIDATES = 4, 72, 2


@dataclass(frozen=True, slots=True)
class ReadingChoice:
    """What the command line says of how rows are read: the kind, and columns by name."""

    conversation: ConversationColumns
    pairs: PreferenceColumns | None = None
    reads: ReadingName | None = None
    responses: str | None = None


class _AmbiguousError(CorpusError):
    """The columns can be read in several ways; `readings` are those."""

    def __init__(self, readings: Sequence[Reading], schema: pa.Schema) -> None:
        super().__init__(f"its rows can be read in {len(readings)} ways; say which.\n{describe(schema)}")
        self.readings = tuple(readings)


def readings_of(schema: pa.Schema) -> list[Reading]:
    """The readings that the names and types of columns allow."""

    def holds(name: str, *, text_alone: bool = False) -> bool:
        if schema.names.count(name) != 1:
            return False
        kind = schema.field(name).type
        return is_text(kind) or (not text_alone and (is_messages(kind) or is_sharegpt(kind)))

    found: list[Reading] = [ConversationColumns(messages=name) for name in MESSAGES_NAMES if holds(name)]
    if holds("response", text_alone=True):
        is_whole = not set(PARTS_OF_INSTRUCTION) & set(schema.names)
        whole = PROMPT_NAMES if is_whole else PROMPT_NAMES[:1]
        found += [ConversationColumns(prompt=name, response="response") for name in whole if holds(name)]
    if holds("chosen") and holds("rejected"):
        found.append(PreferenceColumns("chosen", "rejected", "prompt" if holds("prompt") else None))
    prompts = [name for name in PROMPT_NAMES if holds(name)]
    for name in RESPONSES_NAMES:
        if schema.names.count(name) == 1 and are_candidates(kind := schema.field(name).type):
            found += [CandidateColumns(name, prompt) for prompt in prompts]
            if not prompts and hold_messages(kind):
                found.append(CandidateColumns(name))
    return found


def conversation_reading(schema: pa.Schema, chosen: ConversationColumns | None = None) -> ConversationColumns:
    """The columns of conversations: those `chosen`, else the only ones that there are.

    Raises:
        CorpusError: rows can be read in several ways, there are no such columns, or one has the wrong type; the text
            lists the columns and flags.
    """
    chosen = chosen or ConversationColumns()
    columns = replace(_named(chosen) or _only_conversation(schema), reference=chosen.reference)
    columns.check(schema)
    return columns


def _named(chosen: ConversationColumns) -> ConversationColumns | None:
    if chosen.messages and (chosen.prompt or chosen.response):
        raise CorpusError("--messages-column excludes --prompt-column and --response-column")
    if chosen.messages or not chosen.is_named:
        return chosen if chosen.messages else None
    return ConversationColumns(prompt=chosen.prompt or "prompt", response=chosen.response or "response")


def _only_conversation(schema: pa.Schema) -> ConversationColumns:
    """The one reading as conversations, where there is no other reading; columns of wrong types where that is all."""
    readings = readings_of(schema)
    if len(readings) > 1:
        raise _AmbiguousError(readings, schema)
    if readings and isinstance(readings[0], ConversationColumns):
        return readings[0]
    if readings and isinstance(readings[0], CandidateColumns):
        raise CorpusError(
            f"the input has several responses a row, in {readings[0].responses!r}, and this job reads one conversation "
            f"a row: jobs.score scores them, and jobs.rank makes a row of each.\n{describe(schema)}"
        )
    if readings:
        raise CorpusError(
            "the input has pairs, in 'chosen' and 'rejected', and no conversations: jobs.score reads pairs, and "
            f"--messages-column chosen reads one side.\n{describe(schema)}"
        )
    return _badly_typed(schema)


def _badly_typed(schema: pa.Schema) -> ConversationColumns:
    for name in MESSAGES_NAMES:
        if name in schema.names:
            return ConversationColumns(messages=name)
    if {"prompt", "response"} <= set(schema.names):
        return ConversationColumns(prompt="prompt", response="response")
    raise CorpusError(
        "the input has neither a 'messages' column nor 'prompt' and 'response'; name yours with --messages-column, or "
        f"with --prompt-column and --response-column.\n{describe(schema)}"
    )


def reading_of(schema: pa.Schema, choice: ReadingChoice) -> Reading:
    """The reading that was chosen, else the only one that there is.

    Raises:
        CorpusError: rows can be read in several ways, there are no such columns, or one has the wrong type; the text
            lists the columns and flags.
    """
    readings = readings_of(schema)
    reading = _pairs_of(schema, choice, readings) or _candidates_of(schema, choice, readings)
    if reading is None:
        return _conversation_of(schema, choice, readings)
    reading = replace(reading, reference=choice.conversation.reference)
    reading.check(schema)
    return reading


def _pairs_of(schema: pa.Schema, choice: ReadingChoice, readings: Sequence[Reading]) -> PreferenceColumns | None:
    """The columns of pairs, where pairs are chosen or all there is."""
    if choice.pairs is not None:
        return choice.pairs
    if choice.reads == "pairs":
        named = choice.conversation.prompt
        return PreferenceColumns("chosen", "rejected", named or ("prompt" if "prompt" in schema.names else None))
    only = _only(choice, readings)
    return only if isinstance(only, PreferenceColumns) else None


def _candidates_of(schema: pa.Schema, choice: ReadingChoice, readings: Sequence[Reading]) -> CandidateColumns | None:
    """The columns of candidates, where those are chosen or all there is."""
    if choice.reads != "candidates" and choice.responses is None:
        only = _only(choice, readings)
        return only if isinstance(only, CandidateColumns) else None
    own = [reading for reading in readings if isinstance(reading, CandidateColumns)]
    named, wanted = choice.responses, choice.conversation.prompt
    own = [reading for reading in own if reading.responses == named or named is None]
    if wanted is None and len(own) > 1:
        raise _AmbiguousError(own, schema)
    prompts = [name for name in PROMPT_NAMES if name in schema.names]
    prompt = wanted or (own[0].prompt if own else next(iter(prompts), None))
    return CandidateColumns(named or (own[0].responses if own else RESPONSES_NAMES[0]), prompt)


def _only(choice: ReadingChoice, readings: Sequence[Reading]) -> Reading | None:
    """The one reading that there is, where nothing was said of how rows are read."""
    said = choice.reads is not None or choice.conversation.is_named or choice.responses is not None
    return readings[0] if len(readings) == 1 and not said else None


def _conversation_of(schema: pa.Schema, choice: ReadingChoice, readings: Sequence[Reading]) -> ConversationColumns:
    own = [reading for reading in readings if isinstance(reading, ConversationColumns)]
    if choice.reads == "conversations" and not choice.conversation.is_named and own:
        if len(own) > 1:
            raise _AmbiguousError(own, schema)
        columns = replace(own[0], reference=choice.conversation.reference)
        columns.check(schema)
        return columns
    return conversation_reading(schema, choice.conversation)


def prompt_reading(schema: pa.Schema, chosen: ConversationColumns) -> ConversationColumns:
    """The column of prompts, `prompt` or `messages`: the one `chosen`, else the only one that there is.

    Raises:
        CorpusError: there are several, there is none, or it has the wrong type; the text lists the columns and flags.
    """
    if chosen.messages and chosen.prompt:
        raise CorpusError("--messages-column excludes --prompt-column")
    columns = chosen if chosen.messages or chosen.prompt else replace(_only_prompt(schema), reference=chosen.reference)
    columns.check(schema)
    return columns


def _only_prompt(schema: pa.Schema) -> ConversationColumns:
    found = [ConversationColumns(messages=name) for name in MESSAGES_NAMES if name in schema.names]
    found += [ConversationColumns(prompt="prompt")] if "prompt" in schema.names else []
    if len(found) > 1:
        raise _AmbiguousError(found, schema)
    if not found:
        raise CorpusError(
            "the prompts have neither a 'prompt' column nor 'messages'; name yours with --prompt-column or "
            f"--messages-column.\n{describe(schema)}"
        )
    return found[0]


def same_reading(corpus: Corpus, detect: Callable[[pa.Schema], ReadingT], *, reads_all: bool) -> ReadingT:
    """The reading that `detect` finds, the same in every file.

    Args:
        corpus: the input.
        detect: finds the reading of a schema.
        reads_all: whether the job reads pairs and candidates too, and has the flag that chooses them.

    Raises:
        CorpusError: a file has none, several, or another than the file before it.
    """
    found: dict[ReadingT, InputFile] = {}
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        try:
            found.setdefault(detect(schema), file)
        except _AmbiguousError as error:
            raise CorpusError(_told(corpus, file, schema, error.readings, reads_all)) from None
        except CorpusError as error:
            raise CorpusError(f"{file.path}: {error}") from None
        if len(found) > 1:
            (first, one), (second, other) = found.items()
            raise CorpusError(
                f"{one.path} has {_title(first)}, {other.path} has {_title(second)}; run the job on each by itself, or "
                "name columns that all files have"
            )
    return next(iter(found))


def columns_of(corpus: Corpus, choice: ReadingChoice) -> Reading:
    """The columns of conversations or of pairs, the same in every file.

    Raises:
        CorpusError: a file has none, several, or others than the file before it.
    """
    return same_reading(corpus, lambda schema: reading_of(schema, choice), reads_all=True)


def conversation_columns(corpus: Corpus, chosen: ConversationColumns) -> ConversationColumns:
    """The columns of conversations, the same in every file.

    Raises:
        CorpusError: a file has none, several, or others than the file before it.
    """
    return same_reading(corpus, lambda schema: conversation_reading(schema, chosen), reads_all=False)


def prompt_columns_of(
    corpus: Corpus, chosen: ConversationColumns, *, added: Sequence[str], system_prompt_column: str | None = None
) -> ConversationColumns:
    """The column of prompts (strings or messages) or of messages, the same in every file, with room for `added` ones.

    Raises:
        CorpusError: a file has none, another than the file before it, or columns that the output cannot keep.
    """
    columns = same_reading(corpus, lambda schema: prompt_reading(schema, chosen), reads_all=False)
    check_output(corpus, added=added, system_prompt_column=system_prompt_column)
    return columns


def check_output(corpus: Corpus, *, added: Sequence[str], system_prompt_column: str | None) -> None:
    """Refuse files without the column of system prompts, or without room for the columns that are `added`.

    Raises:
        CorpusError: it names the file and the columns.
    """
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if system_prompt_column is not None:
            try:
                check_column(schema, system_prompt_column, "system-prompt", text_or_messages=False)
            except CorpusError as error:
                raise CorpusError(f"{file.path}: {error}") from None
        check_names(file, schema, added)


def check_names(file: InputFile, schema: pa.Schema, added: Sequence[str]) -> None:
    """Refuse a file that has several columns of one name, or one of a name that is to be `added`.

    Raises:
        CorpusError: it names the columns and the flag that makes room.
    """
    check_output_names(schema, added, file.path)


def check_output_names(schema: pa.Schema, added: Sequence[str], source: str) -> None:
    """Refuse a schema that has several columns of one name, or one of a name that is to be `added`.

    Raises:
        CorpusError: it names the source, the columns and the flag that makes room.
    """
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise CorpusError(f"{source} has several columns of the names {repeated}, which no output can keep")
    if taken := [name for name in added if name in schema.names]:
        raise CorpusError(
            f"{source} already has the columns {taken}; name the new ones apart with --output-prefix, such as "
            "--output-prefix second_"
        )


def _told(corpus: Corpus, file: InputFile, schema: pa.Schema, readings: Sequence[Reading], reads_all: bool) -> str:
    """The refusal of a file: each reading with the flags that choose it, and its first row read so."""
    first = _first_row(corpus, file)
    parts = [f"{file.path}: its rows can be read in {len(readings)} ways; say which:"]
    for reading in readings:
        parts.append(f"- {_title(reading)}: {_flags(reading, reads_all)}. The first row:")
        parts += [f"    {line}" for line in (["(the file has no rows)"] if first is None else _example(first, reading))]
    return "\n".join([*parts, describe(schema)])


def _title(reading: Reading) -> str:
    after = f" after {reading.prompt!r}" if reading.prompt else ""
    if isinstance(reading, PreferenceColumns):
        return f"pairs in {reading.chosen!r} and {reading.rejected!r}{after}"
    if isinstance(reading, CandidateColumns):
        return f"candidates in {reading.responses!r}{after}"
    if reading.messages is not None:
        return f"conversations in {reading.messages!r}"
    if reading.response is None:
        return f"prompts in {reading.prompt!r}"
    return f"conversations in {reading.prompt!r} and {reading.response!r}"


def _flags(reading: Reading, reads_all: bool) -> str:
    if isinstance(reading, PreferenceColumns):
        return "--reads pairs" if reads_all else "jobs.score reads them, with --reads pairs"
    if isinstance(reading, CandidateColumns):
        prompt = f" --prompt-column {reading.prompt}" if reading.prompt else ""
        named = f"--responses-column {reading.responses}{prompt}"
        return named if reads_all else f"jobs.score reads them, with {named}"
    if reading.messages is not None:
        return f"--messages-column {reading.messages}"
    response = f" --response-column {reading.response}" if reading.response else ""
    return f"--prompt-column {reading.prompt}{response}"


def _first_row(corpus: Corpus, file: InputFile) -> pa.Table | CorpusError | None:
    if not file.num_rows:
        return None
    unit = file.unit(0, 1)
    return next(table for _, table in UnitReader(corpus.filesystem).read([unit]))


def _example(first: pa.Table | CorpusError, reading: Reading) -> list[str]:
    """Lines that show the first row as it is read."""
    if isinstance(first, CorpusError):
        return [str(first)]
    if isinstance(reading, PreferenceColumns):
        chosen, rejected = preference_pairs(first, reading)[0]
        return [f"chosen | {line}" for line in _turns(chosen)] + [f"rejected | {line}" for line in _turns(rejected)]
    if isinstance(reading, CandidateColumns):
        row = candidate_rows(first, reading)[0]
        own = enumerate([row] if isinstance(row, ConversationError) else row[:SHOWN_CANDIDATES])
        return [f"{place} | {line}" for place, candidate in own for line in _turns(candidate)]
    is_prompt = reading.messages is None and reading.response is None
    return _turns((prompts if is_prompt else conversations)(first, reading)[0])


def _turns(row: Conversation | ConversationError) -> list[str]:
    if isinstance(row, ConversationError):
        return [f"(no conversation: {row})"]
    lines = [f"{message.role}: {_shortened(message.content)}" for message in row.messages]
    if len(lines) > SHOWN_TURNS:
        left_out = f"({len(lines) - SHOWN_TURNS} more messages)"
        lines = [*lines[: SHOWN_TURNS // 2], left_out, *lines[-(SHOWN_TURNS // 2) :]]
    return lines


def _shortened(text: str) -> str:
    words = " ".join(text[: 4 * SHOWN_CHARS].split())
    return words if len(words) <= SHOWN_CHARS and len(text) <= 4 * SHOWN_CHARS else f"{words[:SHOWN_CHARS]}..."
