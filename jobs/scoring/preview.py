"""The first rows of a corpus as the model would read them: no weights are loaded, and nothing is scored."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from jobs.corpus.candidates import CandidateColumns, candidate_rows
from jobs.corpus.conversations import SystemPrompt, conversations
from jobs.corpus.files import Corpus
from jobs.corpus.preferences import PreferenceColumns, preference_pairs
from jobs.corpus.reader import UnitReader
from jobs.corpus.readings import Reading
from jobs.options import EngineOptions
from jobs.scoring.spec import named
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.chat_template import template_text
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError, ScoringError
from serve_app.reward_model.model_files import resolve
from serve_app.reward_model.tokenizer import EncodedConversation, Tokenizer


def preview(
    corpus: Corpus, reading: Reading, system_prompt: SystemPrompt, options: EngineOptions, *, num_rows: int
) -> Iterator[str]:
    """The first rows, a text for each conversation in them: its place, its number of tokens, and the tokens' text.

    Raises:
        CheckpointError: the model's configuration or tokenizer cannot be read.
        CorpusError: the rows cannot be read.
    """
    tokenizer = tokenizer_of(options)
    for place, row in _shown_rows(corpus, reading, system_prompt, num_rows):
        (encoded,) = tokenizer.encode_batch(
            [row], truncation=options.truncation, max_tokens=options.max_tokens, strict=options.strict
        )
        yield f"{place}{_told(encoded)}\n"
        if isinstance(encoded, EncodedConversation):
            yield tokenizer.decode(encoded.token_ids) + "\n\n"


def tokenizer_of(options: EngineOptions) -> Tokenizer:
    """The tokenizer of the model, without its weights."""
    folder = resolve(named(options), options.revision, weights=False)
    template = None if options.chat_template is None else template_text(options.chat_template)
    return Tokenizer.from_pretrained(folder, config=DecoderConfig.from_folder(folder), chat_template=template)


def _told(encoded: EncodedConversation | ScoringError) -> str:
    if isinstance(encoded, ScoringError):
        encoded.index = None  # its place in a list of one
        return f": {type(encoded).__name__}: {encoded}\n"
    notes = [f"{len(encoded.token_ids):,} tokens", *(["truncated"] if encoded.truncated else []), *encoded.warnings]
    return f", {'; '.join(notes)}:"


def _shown_rows(
    corpus: Corpus, reading: Reading, system_prompt: SystemPrompt, num_rows: int
) -> Iterator[tuple[str, Conversation | ConversationError]]:
    for file in corpus.files:
        wanted = min(num_rows, file.num_rows)
        unit = file.unit(0, wanted)
        for _, table in UnitReader(corpus.filesystem).read([unit] if wanted else []):
            if isinstance(table, Exception):
                raise table
            for row, own in enumerate(row_conversations(table, reading, system_prompt)):
                yield from ((f"row {row} of {file.name}{side}", conversation) for side, conversation in own.items())
        num_rows -= wanted


def row_conversations(
    table: pa.Table, reading: Reading, system_prompt: SystemPrompt
) -> Iterator[dict[str, Conversation | ConversationError]]:
    """The conversations of each row by what tells them apart."""
    if isinstance(reading, PreferenceColumns):
        for chosen, rejected in preference_pairs(table, reading, system_prompt):
            yield {", chosen": chosen, ", rejected": rejected}
    elif isinstance(reading, CandidateColumns):
        for candidates in candidate_rows(table, reading, system_prompt):
            if isinstance(candidates, ConversationError):
                yield {"": candidates}
            else:
                yield {f", response {place}": candidate for place, candidate in enumerate(candidates)}
    else:
        for row in conversations(table, reading, system_prompt):
            yield {"": row}
