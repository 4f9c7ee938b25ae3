"""Make a report of a scored corpus: one HTML file with plots.

    python -m jobs.report --input scored/ --output report.html

It shows, where the corpus has what it takes: how scores are distributed; how they go with length; margins, accuracy
and calibration of labelled pairs; domains or languages side by side; the best and the worst rows; errors by kind; how
the scores were made. The output of jobs.score, jobs.rank and jobs.pairs needs no options; other columns are given by
flag. The page has texts of the corpus unless --num-examples is 0. Exit status: 0 done, 1 the job stopped, 2 an option
is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.report")

import importlib.util
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, NonNegativeInt, field_validator

from cluster.connect import connect
from jobs.command import parse, run_command
from jobs.corpus.conversations import ConversationColumns
from jobs.corpus.files import MAX_UNIT_ROWS, Corpus
from jobs.corpus.storage import OutputFile
from jobs.errors import MissingPackageError
from jobs.grouping.ranks import stretches
from jobs.options import ColumnName
from jobs.reporting.columns import ChosenColumns, ReportColumns
from jobs.reporting.provenance import Provenance
from jobs.reporting.stage import Findings, ReportStage

PACKAGES = ("matplotlib", "jinja2")


class ReportConfig(BaseModel):
    """Make a report of a scored corpus: one HTML file with plots."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    """A Parquet, JSONL, CSV, TSV or Arrow file, a folder of one kind, a glob in quotes, or an s3://, gs:// or hdfs://
    URI."""
    output: str = "report.html"
    """The HTML file, on disk or as a URI; an earlier one is replaced."""
    title: str | None = None
    """Title of the page; by default the name of the input."""
    score_column: tuple[ColumnName, ...] = ()
    """Columns of scores: by default score, or else those of a pair, or else all whose names end in score."""
    by: tuple[ColumnName, ...] = ()
    """Columns of groups to put side by side: by default domain, subset, category, language and lang."""
    label: ColumnName | None = None
    """Column that tells preferred from other responses to a prompt: booleans, 1 and 0, or chosen and rejected; by
    default preferred, is_preferred, label or preference."""
    group_by: ColumnName | None = None
    """Column whose equal values make the candidates of one prompt; by default the prompt itself."""
    pair: tuple[ColumnName, ColumnName] | None = None
    """Two columns of scores, of the preferred and of the other response, where each row is a pair; by default
    chosen_score and rejected_score, or score_chosen and score_rejected."""
    tokens_column: ColumnName | None = None
    """Column of token counts: by default num_tokens, with the prefix that the scores have."""
    error_column: ColumnName | None = None
    """Column of reasons why a row has no score: by default error, with the prefix that the scores have."""
    messages_column: ColumnName | None = None
    """Column of messages: a list of {role, content}, or a JSON string of one."""
    prompt_column: ColumnName | None = None
    """Column of the prompt: a string or messages. Goes with --response-column."""
    response_column: ColumnName | None = None
    """Column of the response: a string."""
    num_examples: NonNegativeInt = 5
    """Number of best and of worst rows that are shown; 0 keeps all texts out of the page."""
    address: str | None = None
    """A running Ray cluster (auto, host:port or ray://host:port); without it a local one is started."""

    @field_validator("output")
    @classmethod
    def _is_page(cls, output: str) -> str:
        if not output.partition("?")[0].lower().endswith((".html", ".htm")):
            raise ValueError("--output is an HTML file: its name ends in .html")
        return output

    @property
    def columns(self) -> ChosenColumns:
        """The columns that were named."""
        return ChosenColumns(
            scores=self.score_column,
            by=self.by,
            label=self.label,
            pair=self.pair,
            group_by=self.group_by,
            tokens=self.tokens_column,
            error=self.error_column,
            texts=ConversationColumns(self.messages_column, self.prompt_column, self.response_column),
        )


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.report") -> int:
    """Run the command line; the exit status."""
    config = parse(ReportConfig, args, prog=prog, description=__doc__)

    def work() -> int:
        run(config)
        return 0

    return run_command(prog, work)


def run(config: ReportConfig) -> Findings:
    """Make the report of a corpus as `config` says; what it tells.

    Raises:
        RaywardError: the job cannot start, or stops; then no page is written.
    """
    _check_packages()
    corpus = Corpus.open(config.input)
    output = OutputFile(config.output)
    columns = ReportColumns.of(corpus, config.columns)
    stage = ReportStage(corpus.filesystem, columns, config.num_examples)
    work = stretches(corpus.units(MAX_UNIT_ROWS), set())
    with connect(config.address):
        findings = stage.run(work, num_rows=corpus.num_rows)
    _write(config, corpus, findings, output)
    return findings


def _write(config: ReportConfig, corpus: Corpus, findings: Findings, output: OutputFile) -> None:
    from jobs.reporting.page import (
        render,  # matplotlib and jinja2 come with an extra
        summary,
    )
    from jobs.reporting.sections import page_of

    title = config.title or f"Scores of {config.input.rstrip('/').rpartition('/')[2] or config.input}"
    files = f"{len(corpus.files):,} file{'s' if len(corpus.files) != 1 else ''}"
    source = f"{config.input} \u00b7 {files} \u00b7 {corpus.num_rows:,} row{'s' if corpus.num_rows != 1 else ''}"
    page = page_of(findings, title=title, source=source, provenance=Provenance.of(config.input))
    num_bytes = output.write(render(page))
    print("\n".join([summary(findings), *page.notes]))
    print(f"{config.output}: {num_bytes / 1000:,.0f} kB")


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"the report needs {' and '.join(missing)}, which the extra 'report' brings: pip install 'rayward[report]'"
        )
