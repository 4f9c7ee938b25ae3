"""The jobs as functions: options as keywords, a result with counts, manifest and summary; JSON lines end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import api
from jobs.errors import CorpusError
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import ROOT, read_parts

LINES = [json.dumps({"id": number, "messages": chat(f"Say {number}.", "so")}) for number in range(9)]


def test_options_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        api.score("in", str(tmp_path / "out"), model="tiny", no_such_option=1)
    with pytest.raises(CorpusError, match="does not exist"):
        api.rank(str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(CorpusError, match="does not exist"):
        api.pairs(str(tmp_path / "none"), str(tmp_path / "out"), min_margin=0.5)
    with pytest.raises(CorpusError, match="does not exist"):
        api.best_of_n(str(tmp_path / "none"), str(tmp_path / "out"), model="tiny", generator="tiny", n=2)
    with pytest.raises(CorpusError, match="does not exist"):
        api.report(str(tmp_path / "none"), str(tmp_path / "out.html"))


def test_the_package_itself_loads_nothing() -> None:
    code = "import jobs, sys; print([name for name in ('ray', 'torch', 'pyarrow', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("local_ray")
def test_json_lines_are_scored_exactly_once_and_resume(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray.data

    block_size = ray.data.DataContext.get_current().target_max_block_size
    (tmp_path / "in.jsonl").write_text("\n".join([*LINES[:4], '{"id": 4, "mess', *LINES[4:]]))
    options: dict[str, Any] = {"model": "tiny", "dtype": "float32", "rows_per_unit": 3, "cpus_per_actor": 1}
    result = api.score(str(tmp_path / "in.jsonl"), str(tmp_path / "out"), **options)
    assert capsys.readouterr().out == ""
    assert (
        ray.data.DataContext.get_current().target_max_block_size == block_size
    )  # pipelines of one's own are as before
    assert result.summary.startswith(f"10 rows in {tmp_path / 'out'}: 9 scored, 1 with errors")
    assert (result.counts["rows"], result.counts["errors"]) == (10, 1)
    assert result.manifest["status"] == "complete"
    table = read_parts(tmp_path / "out")
    expected = tiny.get_scores([json.loads(line)["messages"] for line in LINES])
    assert table["score"].to_pylist() == [*expected[:4], None, *expected[4:]]
    assert table["error"].to_pylist()[4].startswith("ConversationError: line 5 is not JSON: ")
    assert table["line_error"].to_pylist()[4].startswith("line 5 is not JSON: ")
    sorted((tmp_path / "out").glob("part-*"))[2].unlink()
    again = api.score(str(tmp_path / "in.jsonl"), str(tmp_path / "out"), **options)
    assert "10 rows in" in again.summary
    assert "this run 3 rows in" in again.summary
    assert read_parts(tmp_path / "out").equals(table)
