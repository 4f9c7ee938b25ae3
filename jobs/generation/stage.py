"""The generating stage: an actor that adds the candidates of each prompt to a unit's table.

They travel to the scoring stage as one column more, which `choosing.py` takes away again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns, prompts
from jobs.corpus.files import Unit
from jobs.errors import GeneratorError
from jobs.generation.candidates import Candidate, Generation, Generator, Prompt
from jobs.runs.attempts import GuardedModel
from jobs.runs.ledger import Ledger, UnitStats
from serve_app.reward_model.conversation import Conversation

GENERATION_COLUMN = "_rayward_generation"
TYPE = pa.struct(
    [
        ("texts", pa.list_(pa.large_string())),
        ("finish_reasons", pa.list_(pa.string())),
        ("failures", pa.list_(pa.string())),
    ]
)


class UnitGenerator:
    """Generates for units. `load` makes the generator."""

    def __init__(self, load: Callable[[], Generator], ledger: Ledger, *, columns: ConversationColumns) -> None:
        self._guarded = GuardedModel(load, ledger, work="generating", error=GeneratorError)
        self._columns = columns

    def process(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's table with its generations; a row whose prompt is malformed gets an empty one.

        Raises:
            GeneratorError: the generator fails in a way that is no prompt's fault.
        """
        generations = self._guarded.begin(unit, table.num_rows).results(
            lambda generator, first, stop: self._rows(generator, unit, table.slice(first, stop - first), first),
            given_up=_died,
        )
        return with_generations(table, generations), UnitStats()

    def _rows(self, generator: Generator, unit: Unit, table: pa.Table, first: int) -> list[Generation]:
        rows = prompts(table, self._columns)
        asked = [
            Prompt(row.messages, key="{}:{}".format(*unit.place(first + place)))
            for place, row in enumerate(rows)
            if isinstance(row, Conversation)
        ]
        generated = iter(generator.generate(asked) if asked else [])
        return [next(generated) if isinstance(row, Conversation) else Generation(()) for row in rows]


def _died(strikes: int) -> Generation:
    return Generation((), (f"the generating process died {strikes} times on this prompt alone",))


def with_generations(table: pa.Table, generations: Sequence[Generation]) -> pa.Table:
    """`table` with a column more that holds what came of each row's prompt."""
    packed = [
        {
            "texts": [candidate.text for candidate in generation.candidates],
            "finish_reasons": [candidate.finish_reason for candidate in generation.candidates],
            "failures": list(generation.failures),
        }
        for generation in generations
    ]
    return table.append_column(GENERATION_COLUMN, pa.array(packed, TYPE))


def without_generations(table: pa.Table) -> tuple[pa.Table, list[Generation]]:
    """The table and the generations that `with_generations` was given."""
    generations = [
        Generation(
            tuple(Candidate(*pair) for pair in zip(packed["texts"], packed["finish_reasons"], strict=True)),
            tuple(packed["failures"]),
        )
        for packed in table.column(GENERATION_COLUMN).to_pylist()
    ]
    return table.drop_columns([GENERATION_COLUMN]), generations
