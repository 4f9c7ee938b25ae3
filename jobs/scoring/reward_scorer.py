"""A stage of other people's Ray Data pipelines: the tables of a dataset get their scores.

from jobs.api import RewardScorer

dataset = ray.data.read_parquet("s3://bucket/pairs").filter(expr="length > 10")
scored = dataset.map_batches(
    RewardScorer,
    fn_constructor_kwargs={"model": "internlm/internlm2-1_8b-reward", "reads": "pairs"},
    num_gpus=1, concurrency=8, batch_format="pyarrow",
)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.connect import gpus_of_actor
from jobs.corpus.conversations import SystemPrompt
from jobs.corpus.readings import check_output_names, reading_of
from jobs.errors import CorpusError
from jobs.options import ReadingOptions
from jobs.scoring.run import columns_added, scorer_of
from jobs.scoring.spec import check_reference, check_steps, spec_named

if TYPE_CHECKING:
    import ray.data

    from serve_app.reward_model import RewardModel

# Options of a job that a pipeline sets itself, or that it has nothing for.
NOT_HERE = (
    "via_serve",
    "num_actors",
    "gpus_per_actor",
    "cpus_per_actor",
    "rows_per_unit",
    "max_errors",
    "progress",
    "reuse",
    "remember_scores",
    "address",
)
BATCH_ROWS = 1024


class RewardScorer:
    """Scores tables with a reward model, which is loaded once for each actor. For `Dataset.map_batches`, with
    `batch_format="pyarrow"`.

    A batch gets the columns that `jobs.score` adds, in the order of its rows, and each conversation the bits that it
    has there; a row that cannot be scored has its reason in `error`. Prompts are shared within a batch: keep rows of
    one prompt together, and batches large (1,024 rows or more).

    Args:
        model: a folder, a Hugging Face id, or `tiny`, a toy model.
        output_prefix: put in front of the names of the new columns.
        options: as `jobs.score` has them (`reads`, `dtype`, `truncation`, `messages_column`, ...), but for those of
            actors and units.

    Raises:
        ValueError: an option is not there, or is wrong.
        CheckpointError: the model cannot be loaded.
    """

    def __init__(self, model: str, *, output_prefix: str = "", **options: Any) -> None:
        if wrong := [name for name in NOT_HERE if name in options]:
            raise ValueError(f"{', '.join(wrong)}: map_batches says how many actors there are, and what each takes")
        self._options = ReadingOptions(model=model, **options)
        if self._options.scored_steps is not None:
            raise ValueError("steps_column: answers in steps are scored by jobs.score alone")
        self._prefix = output_prefix
        self._system_prompt = SystemPrompt.of(
            self._options.system_prompt,
            self._options.system_prompt_column,
            replaces=self._options.replace_system_prompt,
        )
        spec = spec_named(self._options, self._options.device)
        config, tokenizer = spec.read()
        check_steps(self._options, model, tokenizer.scores_steps)
        check_reference(replace(spec, takes_reference=tokenizer.takes_reference), self._options.reference_column)
        self._attributes = config.head.attributes
        self._model: RewardModel = spec.on_gpus(gpus_of_actor()).load()

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with the columns of its scores.

        Raises:
            CorpusError: its columns hold no conversations, or could be read in several ways; or it has a column of a
                name that is to be added.
        """
        if not isinstance(table, pa.Table):
            raise CorpusError(f'a batch is {type(table).__name__}, not an Arrow table: set batch_format="pyarrow"')
        reading = reading_of(table.schema, self._options.choice)
        names = columns_added(reading, bool(self._attributes), with_turns=self._options.scores_turns)
        added = [self._prefix + name for name in names]
        check_output_names(table.schema, added, "the dataset")
        scorer = scorer_of(
            reading,
            self._given,
            None,
            options=self._options,
            system_prompt=self._system_prompt,
            prefix=self._prefix,
            attributes=self._attributes,
        )
        return scorer.scored(self._model, table)

    def _given(self) -> RewardModel:
        return self._model


def score_dataset(
    dataset: ray.data.Dataset,
    *,
    model: str,
    num_gpus: float | None = None,
    concurrency: int | tuple[int, int] | None = None,
    batch_size: int = BATCH_ROWS,
    **options: Any,
) -> ray.data.Dataset:
    """The dataset with scores, by actors of `RewardScorer`; nothing runs before it is asked for.

    Args:
        dataset: rows that hold conversations, pairs or candidates.
        model: a folder, a Hugging Face id, or `tiny`.
        num_gpus: of each actor: by default 1 where the cluster has GPUs, else none. Several share a model's layers.
        concurrency: actors, or the least and the most of them: by default one a GPU, or one a node.
        batch_size: rows that are scored together, and share prompts.
        options: as `RewardScorer` has them.
    """
    import ray

    has_gpus = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    gpus = num_gpus if num_gpus is not None else min(1.0, has_gpus)
    nodes = sum(bool(node["Alive"]) for node in ray.nodes()) if ray.is_initialized() else 1
    actors = concurrency or (max(1, int(has_gpus / gpus)) if gpus else nodes)
    return dataset.map_batches(
        RewardScorer,
        fn_constructor_kwargs={"model": model, **options},
        num_gpus=gpus or None,
        concurrency=actors,
        batch_size=batch_size,
        batch_format="pyarrow",
    )
