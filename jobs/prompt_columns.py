"""Which column of a corpus holds the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from jobs.columns import ConversationColumns, check_column, check_names, describe
from jobs.corpus import Corpus, InputFile
from jobs.errors import CorpusError

__all__ = ["prompt_columns_of"]


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
    columns = chosen if chosen.messages or chosen.prompt else _by_name(schema)
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
