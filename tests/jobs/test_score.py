"""jobs.score end to end on a local Ray: every row, its columns, its score, and clear ends to bad runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from jobs.best_of_n import BestOfNConfig
from jobs.errors import CorpusError, OutputError, ResourceError, ScorerError, TooManyErrorsError
from jobs.rewardbench import RewardBenchConfig
from jobs.runs.placement import ActorPool
from jobs.score import ScoreConfig, main, run
from serve_app.reward_model import CheckpointError, ModelSpec, RewardModel
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write
from tests.jobs.faults import POISON, BrokenModel, DyingModel, Loader, OnceDyingModel
from tests.reward_model import stepwise

pytestmark = pytest.mark.usefixtures("local_ray")
U = {"role": "user", "content": "And?"}


def config(tmp_path: Path, **options: Any) -> ScoreConfig:
    defaults = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "model": "tiny", "dtype": "float32"}
    return ScoreConfig(**{**defaults, "cpus_per_actor": 2, **options})


def corpus(folder: Path, count: int, *, poison: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """`count` rows in two files; the rows numbered in `poison` hold the trigger of the harmful models."""
    rows = [
        {"id": number, "messages": chat(f"Count to {number}.", POISON if number in poison else "I would rather not.")}
        for number in range(count)
    ]
    half = count // 2
    write(folder / "a.parquet", rows[:half], row_group_size=7)
    write(folder / "b.parquet", rows[half:], row_group_size=7)
    return rows


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of 20 rows in `in` and the output of its finished job in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    corpus(folder / "in", 20)
    run(config(folder))
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> dict[str, str]:
    """The options of that job run again, on a copy of its output."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return {"input": str(finished / "in")}


def test_every_row_is_scored_with_its_columns_and_in_order(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = corpus(tmp_path / "in", 60)
    total = run(config(tmp_path, rows_per_unit=16))
    spent = r"rows in T \(start T, load T, score T\), [\d,]+ tokens/s while scoring$".replace("T", r"\d+:\d\d")
    assert re.search(spent, capsys.readouterr().out.strip())
    table = read_parts(tmp_path / "out")
    assert table.select(["id", "messages"]).to_pylist() == rows
    scores = tiny.score([row["messages"] for row in rows])
    assert table["score"].to_pylist() == [score.value for score in scores]
    assert table["num_tokens"].to_pylist() == [score.num_tokens for score in scores]
    assert table["truncated"].to_pylist() == [False] * 60
    assert table["error"].null_count == 60
    kinds = {name: table.schema.field(name).type for name in ("score", "num_tokens", "truncated", "error")}
    assert kinds == {"score": pa.float32(), "num_tokens": pa.int32(), "truncated": pa.bool_(), "error": pa.string()}
    assert (total.rows, total.errors, total.tokens) == (60, 0, sum(score.num_tokens for score in scores))


def test_the_manifest_records_the_run_and_working_folders_go(finished: Path) -> None:
    manifest = json.loads((finished / "out" / "_manifest.json").read_text())
    assert (manifest["status"], manifest["rows"], manifest["errors"]) == ("complete", 20, 0)
    assert manifest["identity"]["dtype"] == "float32"
    assert len(manifest["identity"]["model_fingerprint"]) == 16
    fingerprint = manifest["identity"]["model_fingerprint"]
    assert manifest["model"].items() >= {"name": "tiny", "revision": None, "fingerprint": fingerprint}.items()
    assert {"rayward", "ray", "torch", "transformers"} == manifest["versions"].keys()
    assert manifest["tokens"] > 0
    assert manifest["seconds"] > 0
    others = {path.name for path in (finished / "out").iterdir() if not path.name.startswith("part-")}
    assert others == {"_manifest.json", "_plan.json", "_scores"}


@pytest.mark.usefixtures("in_process")
def test_a_bad_row_carries_its_error_and_the_job_goes_on(tmp_path: Path) -> None:
    good: dict[str, Any] = {"prompt": "hi", "response": "yes"}
    rows = [good, good | {"response": None}, {"prompt": "word " * 80, "response": "no"}, good]
    write(tmp_path / "in" / "a.parquet", rows)
    total = run(config(tmp_path, max_tokens=60))
    table = read_parts(tmp_path / "out")
    assert total.errors == 2
    assert [score is None for score in table["score"].to_pylist()] == [False, True, True, False]
    first, null, long, last = table["error"].to_pylist()
    assert (first, last) == (None, None)
    assert null == "ConversationError: the response is null"
    assert long.startswith("ConversationTooLongError: conversation has ")
    assert table["num_tokens"].null_count == table["truncated"].null_count == 2


@pytest.mark.usefixtures("in_process")
def test_every_turn_of_real_conversations(tmp_path: Path, tiny: RewardModel, shared: Path) -> None:
    source = pq.read_table(shared / "data" / "hh_harmless" / "part-00.parquet", columns=["messages"]).slice(0, 3)
    talks = source["messages"].to_pylist()
    broken = [chat("only a question"), [*chat("a", "b", "c"), {"role": "assistant", "content": " "}], [*talks[0], U]]
    write(tmp_path / "in" / "a.parquet", [{"messages": talk} for talk in [*talks, *broken]])
    total = run(config(tmp_path, every_turn=True, strict=True, output_prefix="my_"))
    table = read_parts(tmp_path / "out")
    rows = table.to_pylist()
    for talk, row in zip(talks, rows, strict=False):
        turns = tiny.score_turns(talk)
        assert row["my_turn_scores"] == [turn.value for turn in turns]
        assert row["my_turn_tokens"] == [turn.num_tokens for turn in turns]
        assert row["my_score"] == tiny.get_score(talk)
    kinds = [str(table.schema.field(f"my_{name}").type) for name in ("turn_scores", "turn_tokens")]
    assert kinds == ["list<element: float>", "list<element: int32>"]
    silent, empty, unanswered = rows[-3:]
    assert silent["my_error"].startswith("ConversationError: no message has the role 'assistant'")
    assert empty["my_error"].startswith("MalformedConversationError: turn 1: empty_response")
    assert unanswered["my_error"].startswith("MalformedConversationError: turn ")
    assert [row["my_turn_scores"] for row in rows[-3:]] == [None] * 3
    assert (total.errors, total.counts["turns"]) == (3, sum(len(tiny.score_turns(talk)) for talk in talks))
    with pytest.raises(OutputError, match="every_turn: True there, None now"):
        run(config(tmp_path, strict=True, output_prefix="my_"))


@pytest.mark.usefixtures("in_process")
def test_answers_in_steps(tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(
        stepwise.KINDS["trl"].write(tmp_path / "prm"), device="cpu", dtype="float32", head="steps:trl"
    )
    answers = [*stepwise.ANSWERS, None, [], ["so on " * 90]]
    rows = [{"prompt": stepwise.QUESTION, "completions": steps} for steps in answers]
    write(tmp_path / "in" / "a.parquet", [*rows, {"prompt": None, "completions": ["a"]}])
    options = {"model": str(tmp_path / "prm"), "head": "steps:trl", "steps_column": "completions", "max_tokens": 200}
    total = run(config(tmp_path, aggregate="minimum", **options))
    table = read_parts(tmp_path / "out")
    assert table.column_names == ["prompt", "completions", "score", "step_scores", "num_tokens", "error"]
    assert str(table.schema.field("step_scores").type) == "list<element: float>"
    prompt = [{"role": "user", "content": stepwise.QUESTION}]
    expected = [model.score_steps(prompt, steps) for steps in stepwise.ANSWERS]
    assert table["step_scores"].to_pylist() == [*expected, None, None, None, None]
    assert table["score"].to_pylist()[:2] == [min(scores) for scores in expected]
    null, empty, long, bad = table["error"].to_pylist()[2:]
    assert (null, empty) == (
        "ConversationError: the steps are null",
        "ConversationError: an answer is a list of one or more steps, each a string",
    )
    assert long.startswith("ConversationTooLongError: ")
    assert bad.startswith("ConversationError: ")
    assert (total.rows, total.errors, total.counts["steps"]) == (6, 4, 6)
    with pytest.raises(OutputError, match="aggregate: 'minimum' there, None now"):
        run(config(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps_column": "steps"}, "tiny scores conversations as a whole: leave --steps-column steps out"),
        ({"steps_column": "prompt"}, "--steps-column takes lists of strings"),
        ({"steps_column": "other"}, "no column 'other' for --steps-column"),
        ({"model": "prm", "response_column": "prompt"}, "name their column in jobs.score with --steps-column"),
    ],
)
def test_steps_and_models_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "a", "steps": ["b"]}])
    if options.get("model") == "prm":
        options = options | {"model": str(stepwise.KINDS["qwen"].write(tmp_path / "prm"))}
    with pytest.raises(CorpusError, match=reason):
        run(config(tmp_path, **options))
    for wrong in ({"aggregate": "last"}, {"steps_column": "a", "every_turn": True}, {"steps_column": "a", "show": 1}):
        with pytest.raises(ValidationError, match="steps-column"):
            config(tmp_path, **wrong)


def test_every_turn_is_for_conversations(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"chosen": chat("a", "b"), "rejected": chat("a", "c")}])
    with pytest.raises(CorpusError, match="--messages-column chosen reads one side"):
        run(config(tmp_path, every_turn=True))
    with pytest.raises(ValidationError, match="--every-turn is for conversations"):
        config(tmp_path, every_turn=True, reads="pairs")


@pytest.mark.usefixtures("in_process")
def test_truncation_is_told_per_row(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "word " * 80, "response": "no"}, {"prompt": "a", "response": "b"}])
    run(config(tmp_path, max_tokens=60, truncation="left"))
    table = read_parts(tmp_path / "out")
    assert table["truncated"].to_pylist() == [True, False]
    assert table["num_tokens"][0].as_py() == 60


@pytest.mark.usefixtures("in_process")
def test_a_system_prompt_conditions_every_score_and_belongs_to_the_run(tmp_path: Path, tiny: RewardModel) -> None:
    rows = corpus(tmp_path / "in", 4)
    run(config(tmp_path, system_prompt="Judge the arithmetic."))
    conditioned = [[{"role": "system", "content": "Judge the arithmetic."}, *row["messages"]] for row in rows]
    table = read_parts(tmp_path / "out")
    assert table["score"].to_pylist() == tiny.get_scores(conditioned)
    assert table["messages"].to_pylist() == [row["messages"] for row in rows]
    with pytest.raises(OutputError, match="system_prompt"):
        run(config(tmp_path, system_prompt="Judge the style."))
    with pytest.raises(CorpusError, match="no column 'domain' for --system-prompt-column"):
        run(config(tmp_path, system_prompt_column="domain"))


@pytest.mark.usefixtures("in_process")
def test_actors_spread_the_layers_over_their_gpus(
    tmp_path: Path, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with two devices in place of two cards; the run is the one of a single device."""
    rows = corpus(tmp_path / "in", 4)
    loaded = []

    def load(spec: ModelSpec) -> RewardModel:
        loaded.append(spec.load())
        return loaded[-1]

    with monkeypatch.context() as patch:
        patch.setattr("jobs.scoring.run.plan_actors", lambda resources, **options: ActorPool(1, 1, 2.0))
        patch.setattr("jobs.scoring.run.shortage", lambda pool, free: None)
        run(config(tmp_path), load=load)
    assert [len(model.devices) for model in loaded] == [2]
    assert read_parts(tmp_path / "out")["score"].to_pylist() == tiny.get_scores([row["messages"] for row in rows])
    run(config(tmp_path))  # done already: the same run on one device


@pytest.mark.usefixtures("in_process")
def test_more_errors_than_allowed_stop_the_job(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "hi", "response": "yes"}
    write(tmp_path / "in" / "a.parquet", [row, *[row | {"response": None}] * 5])
    with pytest.raises(TooManyErrorsError, match=r"5 rows failed, --max-errors allows 4"):
        run(config(tmp_path, max_errors=4))
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["status"] == "stopped"
    assert manifest["reason"].startswith("TooManyErrorsError: 5 rows failed")
    assert run(config(tmp_path, max_errors=5)).errors == 5


@pytest.mark.usefixtures("in_process")
def test_files_without_rows_keep_their_schema(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 4)
    empty = pq.read_table(tmp_path / "in" / "a.parquet").slice(0, 0)
    for file in (tmp_path / "in").iterdir():
        file.unlink()
    pq.write_table(empty, tmp_path / "in" / "c.parquet")
    assert run(config(tmp_path)).rows == 0
    parts = sorted((tmp_path / "out").glob("part-c-*"))
    assert [pq.read_table(part).schema.names for part in parts] == [
        ["id", "messages", "score", "num_tokens", "truncated", "error"]
    ]


def test_a_finished_job_run_again_does_nothing(tmp_path: Path, again: dict[str, str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    total = run(config(tmp_path, **again))
    assert (total.rows, total.errors, total.tokens) == (
        20,
        0,
        sum(read_parts(tmp_path / "out")["num_tokens"].to_pylist()),
    )
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}


@pytest.mark.usefixtures("in_process")
def test_new_files_are_added_to_a_finished_output(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 20)
    run(config(tmp_path))
    write(tmp_path / "in" / "c.parquet", [{"id": 99, "messages": chat("more", "yes")}])
    assert run(config(tmp_path)).rows == 21
    assert read_parts(tmp_path / "out")["id"].to_pylist() == [*range(20), 99]


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"truncation": "left"}, {"max_tokens": 100}, {"rows_per_unit": 3}]
)
def test_a_restart_with_other_settings_is_refused(
    tmp_path: Path, again: dict[str, str], change: dict[str, Any]
) -> None:
    with pytest.raises(OutputError, match=next(iter(change))):
        run(config(tmp_path, **again, **change))


def test_a_restart_with_another_model_is_refused(tmp_path: Path, again: dict[str, str], other_folder: Path) -> None:
    with pytest.raises(OutputError, match="model_fingerprint"):
        run(config(tmp_path, **again, model=str(other_folder)))


@pytest.mark.usefixtures("in_process")
def test_score_columns_that_are_there_need_a_prefix(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "hi", "response": "yes", "score": 1.0}])
    with pytest.raises(CorpusError, match=r"already has the columns \['score'\].*--output-prefix"):
        run(config(tmp_path))
    run(config(tmp_path, output_prefix="new_"))
    assert read_parts(tmp_path / "out").schema.names[2:] == [
        "score", "new_score", "new_num_tokens", "new_truncated", "new_error"
    ]  # fmt: skip


def test_files_with_their_conversations_in_different_columns_are_refused(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 4)
    write(tmp_path / "in" / "c.parquet", [{"prompt": "hi", "response": "yes"}])
    with pytest.raises(CorpusError, match=r"a\.parquet has conversations in .*c\.parquet has"):
        run(config(tmp_path))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table([["hi"], ["yes"], [1], [2]], names=["prompt", "response", "id", "id"])
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(CorpusError, match=r"several columns of the names \['id'\]"):
        run(config(tmp_path))


def test_actors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 4)
    with pytest.raises(ResourceError, match="--num-actors or --cpus-per-actor"):
        run(config(tmp_path, cpus_per_actor=16))
    assert not (tmp_path / "out").exists()


def test_a_refused_restart_leaves_the_manifest_as_it_was(tmp_path: Path, again: dict[str, str]) -> None:
    before = (tmp_path / "out" / "_manifest.json").read_text()
    with pytest.raises(OutputError):
        run(config(tmp_path, **again, truncation="left"))
    run(config(tmp_path, **again))
    assert (tmp_path / "out" / "_manifest.json").read_text() == before


def test_a_model_that_is_not_there_stops_the_job_at_once(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 4)
    with pytest.raises(CheckpointError, match="does not exist"):
        run(config(tmp_path, model="./nowhere"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
def test_data_that_cannot_be_read_stops_the_job_and_names_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} {'x' * 50}", "response": "yes"} for number in range(3000)]
    path = write(tmp_path / "in" / "a.parquet", rows, row_group_size=1000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.parquet cannot be read from row"):
        run(config(tmp_path))


@pytest.mark.slow
def test_a_row_that_kills_the_scorer_is_marked_and_the_others_scored(tmp_path: Path, tiny: RewardModel) -> None:
    rows = corpus(tmp_path / "in", 8, poison=(5,))
    total = run(config(tmp_path, rows_per_unit=4), load=Loader(DyingModel, tmp_path))
    table = read_parts(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(8))
    assert total.errors == 1
    errors, scores = table["error"].to_pylist(), table["score"].to_pylist()
    assert errors.pop(5) == "DeadRowError: the scoring process died 2 times on this row alone"
    assert errors == [None] * 7
    del rows[5], scores[5]
    assert scores == tiny.get_scores([row["messages"] for row in rows])
    assert len(list(tmp_path.glob("death-*"))) == 4  # on 4, 2, 1 and again 1 rows


def test_an_actor_that_dies_once_is_replaced_and_its_unit_redone(tmp_path: Path, tiny: RewardModel) -> None:
    rows = corpus(tmp_path / "in", 40, poison=(13,))
    total = run(config(tmp_path, rows_per_unit=20), load=Loader(OnceDyingModel, tmp_path))
    assert (tmp_path / "died").exists()
    assert total.errors == 0
    assert read_parts(tmp_path / "out")["score"].to_pylist() == tiny.get_scores([row["messages"] for row in rows])


@pytest.mark.slow
def test_a_process_that_dies_loading_the_model_ends_the_job(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "hi", "response": "yes"}])
    with pytest.raises(ScorerError, match="died 3 times while loading the model"):
        run(config(tmp_path), load=Loader(None, tmp_path))
    assert len(list(tmp_path.glob("load-*"))) == 3


@pytest.mark.usefixtures("in_process")
def test_a_failure_that_is_no_rows_fault_ends_the_job_and_keeps_what_is_committed(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 40, poison=(39,))
    with pytest.raises(ScorerError, match="RuntimeError: an illegal memory access"):
        run(config(tmp_path, rows_per_unit=10), load=Loader(BrokenModel, tmp_path))
    assert run(config(tmp_path, rows_per_unit=10)).rows == 40


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["jobs.score", *arguments])
    return main()


@pytest.mark.usefixtures("in_process")
def test_the_exit_status_says_whether_rows_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "hi", "response": "yes"}, {"prompt": "hi", "response": None}]
    path = write(tmp_path / "a.parquet", rows)
    arguments = ["--input", str(path), "--output", str(tmp_path / "out"), "--cpus-per-actor", "2", "--model", "tiny"]
    assert command(monkeypatch, *arguments) == 3
    told = capsys.readouterr().out
    assert f"2 rows in {tmp_path / 'out'}: 1 scored, 1 with errors" in told
    assert told.endswith(f"\nnext: rayward rank --input {tmp_path / 'out'} --output ranked\n")
    assert command(monkeypatch, *arguments, "--truncation", "left") == 1
    assert "jobs.score stopped: " in capsys.readouterr().err
    assert (
        command(monkeypatch, "--input", str(tmp_path / "no"), "--output", str(tmp_path / "o"), "--model", "tiny") == 1
    )
    assert "does not exist" in capsys.readouterr().err


def test_a_job_that_names_no_model_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--input", "a", "--output", "b")
    assert caught.value.code == 2
    assert "--model is required" in capsys.readouterr().err
    for kind, own in ((BestOfNConfig, {"prompts": "a"}), (RewardBenchConfig, {"input": "a"})):
        with pytest.raises(ValidationError, match="--model is required"):
            kind.model_validate({"output": "b", **own})
    assert ScoreConfig(input="a", output="b", via_serve="app").model is None


def test_the_help_tells_what_every_option_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name in ScoreConfig.model_fields:
        assert "--" + name.replace("_", "-") in printed
    assert "python -m jobs.score --input data/" in printed


@pytest.mark.usefixtures("in_process")
def test_pairs_are_scored_on_both_sides_and_resume_as_pairs(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """UltraFeedback's form: the prompt stands in both sides, and `messages` is the chosen one again."""
    sides = [(chat(f"Count to {n}.", "one, two"), chat(f"Count to {n}.", "I would rather not.")) for n in range(10)]
    rows: list[dict[str, Any]] = [
        {"prompt": one[0]["content"], "chosen": one, "rejected": two, "messages": one} for one, two in sides
    ]
    write(tmp_path / "in" / "a.parquet", [*rows, rows[0] | {"rejected": None}])
    with pytest.raises(CorpusError, match=r"(?s)can be read in 2 ways.*--messages-column messages.*--reads pairs"):
        run(config(tmp_path))
    total = run(config(tmp_path, reads="pairs"))
    table = read_parts(tmp_path / "out")
    chosen, rejected = (tiny.get_scores([row[side] for row in sides]) for side in (0, 1))
    assert table["chosen_score"].to_pylist() == [*chosen, chosen[0]]
    assert table["rejected_score"].to_pylist() == [*rejected, None]
    assert table["margin"].to_pylist() == [
        *(pa.array(chosen, pa.float32()).to_numpy() - pa.array(rejected, pa.float32()).to_numpy()).tolist(),
        None,
    ]
    assert table["error"].to_pylist() == [None] * 10 + ["rejected: ConversationError: it is null"]
    assert (total.rows, total.errors, total.counts["pairs"]) == (11, 1, 10)
    assert "of 10 pairs (95 % interval " in capsys.readouterr().out
    with pytest.raises(OutputError, match="columns"):
        run(config(tmp_path, reads="conversations"))
