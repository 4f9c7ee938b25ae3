"""Options that several jobs have, with their help texts."""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from jobs.corpus.conversations import ConversationColumns
from jobs.corpus.preferences import PreferenceColumns
from jobs.corpus.readings import ReadingChoice, ReadingName
from jobs.corpus.sources import Source
from serve_app.reward_model.scores import Aggregate
from serve_app.reward_model.spec import is_uneven
from serve_app.reward_model.tokenizer import Truncation

OPTIONS = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

ColumnName = Annotated[str, Field(min_length=1)]


class CorpusOptions(BaseModel):
    """Options of what a job reads and where it writes."""

    model_config = OPTIONS

    input: str | tuple[str, ...]
    """A Parquet, JSONL, CSV, TSV or Arrow file, a folder of one kind, a glob in quotes, or an s3://, gs:// or hdfs://
    URI; or several of them, on one store; or a dataset of the Hub: hf://datasets/ORG/NAME[@REVISION]/PATH, or ORG/NAME
    with --split."""
    output: str
    """A folder or URI for the results; made if it is not there."""
    partition_columns: bool = True
    """Make columns of folders such as lang=en/ in the input: --no-partition-columns does not."""

    split: str | None = Field(default=None, min_length=1)
    """Read one split, such as train: of a dataset on the Hub as its card says, else the files that are named so."""
    config: str | None = Field(default=None, min_length=1)
    """A configuration of a dataset on the Hub that has several."""

    @field_validator("input")
    @classmethod
    def _has_an_input(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not given or not all(given if isinstance(given, tuple) else [given]):
            raise ValueError("--input names no input")
        return given[0] if isinstance(given, tuple) and len(given) == 1 else given

    @property
    def source(self) -> Source:
        """The inputs."""
        locations = (self.input,) if isinstance(self.input, str) else self.input
        return Source(locations, self.partition_columns, self.split, self.config)


class EngineOptions(BaseModel):
    """Options of what scores conversations, and where."""

    model_config = OPTIONS

    model: str | None = None
    """A folder, a Hugging Face id such as internlm/internlm2-1_8b-reward, or tiny, a toy model."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where actors score: auto is cuda where the cluster has GPUs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on cuda; on cpu bfloat16 where the processor has it, else float32."""
    quantization: Literal["none", "fp8"] | None = None
    """fp8 multiplies 8-bit floats: faster on Hopper GPUs and newer, and scores drift. By default none, and with
    --via-serve what the application's replicas do."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A file with a Jinja chat template in place of the checkpoint's, such as for one that has none."""
    base_model: str | None = Field(default=None, min_length=1)
    """For a LoRA adapter: the folder or id of the model it changes, in place of the one it names."""
    head: str | None = Field(default=None, pattern=r"^(logit:[0-9]+|steps:.+)$")
    """logit:ID scores with the logit of vocabulary row ID at the last token, for language models trained so, such as
    Llama-3.1-Nemotron-70B-Reward-HF (logit:0). steps:shepherd, steps:rlhflow and steps:trl name the rule of a process
    reward model, for --steps-column."""
    normalize: bool = False
    """Normalise scores with the mean and deviation that OpenRLHF saved with the checkpoint."""
    token_budget: PositiveInt | None = None
    """Tokens in one forward pass; by default chosen for the device."""
    prefix_cache_bytes: NonNegativeInt | Literal["auto"] = 0
    """Memory of an actor's device for recent prefixes, which later batches need not read again: 0 keeps none, auto is
    256 MiB on CPUs and a sixteenth of what the weights leave free on a GPU."""
    truncation: Truncation = "error"
    """A conversation over the limit: error marks its row, right keeps its start, left drops its oldest turns."""
    max_tokens: int | None = Field(default=None, ge=2)
    """A limit below the model's own."""
    strict: bool = False
    """Make an error of what is a warning otherwise: an unknown role, a last message that is not the assistant's, an
    empty response."""
    system_prompt: str | None = None
    """A system message put in front of every conversation: the text, or @FILE that holds it."""
    system_prompt_column: ColumnName | None = None
    """Column with each row's system message; a row where it is null gets none."""
    replace_system_prompt: bool = False
    """Put it in place of a system message that is there already, which is an error otherwise."""
    num_actors: PositiveInt | None = None
    """Scoring actors: by default one a GPU; where there are none up to eight a node, as memory and the corpus allow."""
    gpus_per_actor: PositiveFloat | None = None
    """GPUs an actor takes on cuda: 1 by default, less to share one; 2 or more, on one node, share a model's layers."""
    cpus_per_actor: PositiveInt | None = None
    """CPUs an actor takes, and its torch threads: by default a node's, shared by its actors; on cuda 1."""
    rows_per_unit: PositiveInt | None = None
    """Rows that are committed together: by default from the corpus's size, 256 to 16384."""
    max_errors: NonNegativeInt | None = None
    """Stop once more rows than this have failed."""
    progress: Literal["auto", "json"] = "auto"
    """auto: a bar on a terminal, else a log line every 10 seconds; json: an object a line on stderr, for schedulers."""
    address: str | None = Field(default=None, validate_default=True)
    """A Ray cluster: auto, or host:port of its head; by default RAY_ADDRESS, else a local one is started."""

    @property
    def scored_steps(self) -> str | None:
        """The column of answers in steps, where those are scored and no whole conversations."""
        return None

    @model_validator(mode="after")
    def _device_multiplies_so(self) -> Self:
        if self.quantization == "fp8" and self.device == "cpu":
            raise ValueError("--quantization fp8 with --device cpu: fp8 is for Hopper GPUs and newer; leave one out")
        if self.gpus_per_actor is not None and is_uneven(self.gpus_per_actor):
            raise ValueError(
                f"--gpus-per-actor {self.gpus_per_actor:g}: an actor takes a part of a GPU, or a whole number of them"
            )
        return self

    @field_validator("address")
    @classmethod
    def _is_no_client(cls, address: str | None) -> str | None:
        if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
            raise ValueError(
                "Ray Data, which jobs run on, does not work through Ray Client (ray://); give the head's host:port, or "
                "submit the job: ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.score ..."
            )
        return address


def check_model_named(model: str | None) -> None:
    """Refuse a job that does not say which model scores.

    Raises:
        ValueError: so it is.
    """
    if model is None:
        raise ValueError(
            "--model is required: a folder, a Hugging Face id such as internlm/internlm2-1_8b-reward, or tiny, a toy, "
            "to try it out"
        )


class ScoringOptions(EngineOptions):
    """Options of how conversations are found in rows, and of what scores them."""

    messages_column: ColumnName | None = None
    """Column of messages: a list of {role, content}, or a JSON string of one."""
    prompt_column: ColumnName | None = None
    """Column of the prompt: a string or messages. Goes with --response-column."""
    response_column: ColumnName | None = None
    """Column of the response: a string."""
    reference_column: ColumnName | None = None
    """Column of the answer that the response is compared with, a string or messages: POLAR's models need it."""
    reuse: tuple[str, ...] = ()
    """Outputs of earlier jobs with the same model: conversations that they have scored are not computed again."""
    remember_scores: bool = True
    """Compute equal conversations once, and keep the hashes of all in the output, for --reuse: --no-remember-scores
    computes each."""
    via_serve: str | None = Field(default=None, min_length=1)
    """Score with the replicas of this running Serve application: its name, or NAME/MODEL where it serves several."""

    @model_validator(mode="after")
    def _reuse_remembers(self) -> Self:
        if self.reuse and not self.remember_scores:
            raise ValueError("--reuse and --no-remember-scores exclude each other: leave one out")
        return self

    @model_validator(mode="after")
    def _replicas_are_as_they_are(self) -> Self:
        names = ("gpus_per_actor", "token_budget", "chat_template", "base_model", "head")
        fixed = [name for name in names if getattr(self, name) is not None] + ["normalize"] * self.normalize
        fixed += ["prefix_cache_bytes"] * (self.prefix_cache_bytes != 0)
        if self.via_serve is not None and fixed:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in fixed)
            raise ValueError(f"{flags} cannot be set with --via-serve: the application's replicas decide it")
        return self

    @property
    def columns(self) -> ConversationColumns:
        """The columns that were named."""
        return ConversationColumns(
            self.messages_column, self.prompt_column, self.response_column, self.reference_column
        )

    @property
    def choice(self) -> ReadingChoice | None:
        """What was said of how rows are read; None for a job that reads conversations alone."""
        return None

    @property
    def scores_turns(self) -> bool:
        """Whether conversations are scored after each of their answers."""
        return False

    @property
    def step_aggregate(self) -> Aggregate | None:
        """What makes one score of an answer's steps."""
        return None


class ReadingOptions(ScoringOptions):
    """Options of a job that reads pairs and candidates as well as conversations."""

    reads: ReadingName | None = None
    """What a row is: one conversation, a pair with a chosen and a rejected side, or candidates, several responses to
    one prompt. By default the columns tell."""
    chosen_column: ColumnName | None = None
    """Column of the chosen side of pairs: messages, a transcript, or a response to --prompt-column."""
    rejected_column: ColumnName | None = None
    """Column of the rejected side of pairs, like --chosen-column."""
    responses_column: ColumnName | None = None
    """Column of candidates: a list of strings, of messages, or of structs with a response field."""
    steps_column: ColumnName | None = None
    """Column of answers in steps, lists of strings, for a process reward model: each step gets a score. The prompt is
    in --prompt-column or --messages-column."""
    aggregate: Aggregate | None = None
    """Also make one score of an answer's steps: their product, the minimum or the last."""
    every_turn: bool = False
    """Also score each conversation as it was after each message of the assistant, which takes little longer: adds
    turn_scores and turn_tokens, lists with an element for each."""

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        sides = self.chosen_column is not None or self.rejected_column is not None
        if sides and self.reads == "conversations":
            raise ValueError("--chosen-column and --rejected-column name pairs: leave --reads conversations out")
        if (sides or self.reads == "pairs") and (self.messages_column or self.response_column):
            raise ValueError("pairs have --chosen-column and --rejected-column: leave the columns of conversations out")
        listed = self.responses_column is not None or self.reads == "candidates"
        if listed and (sides or self.messages_column or self.response_column or self.reads not in (None, "candidates")):
            raise ValueError(
                "candidates have --responses-column and --prompt-column: leave other columns and reads out"
            )
        if self.every_turn and (sides or listed or self.reads == "pairs"):
            raise ValueError("--every-turn is for conversations: leave the columns of pairs and candidates out")
        return self

    @property
    def choice(self) -> ReadingChoice:
        """What was said of how rows are read. Columns of pairs that are named are read without any others."""
        named = None
        if self.chosen_column is not None or self.rejected_column is not None:
            named = PreferenceColumns(
                self.chosen_column or "chosen", self.rejected_column or "rejected", self.prompt_column
            )
        return ReadingChoice(self.columns, named, self.reads, self.responses_column)

    @model_validator(mode="after")
    def _steps_alone(self) -> Self:
        if self.steps_column is None:
            if self.aggregate is not None:
                raise ValueError("--aggregate is for --steps-column")
            return self
        others = ("reads", "chosen_column", "rejected_column", "responses_column", "response_column")
        wrong = [name for name in (*others, "reference_column") if getattr(self, name) is not None]
        wrong += ["every_turn"] * self.every_turn + ["truncation"] * (self.truncation != "error")
        if wrong:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise ValueError(f"--steps-column is for a prompt and an answer in steps: leave {flags} out")
        return self

    @property
    def scores_turns(self) -> bool:
        """Whether conversations are scored after each of their answers."""
        return self.every_turn

    @property
    def scored_steps(self) -> str | None:
        """The column of answers in steps, where those are scored and no whole conversations."""
        return self.steps_column

    @property
    def step_aggregate(self) -> Aggregate | None:
        """What makes one score of an answer's steps."""
        return self.aggregate
