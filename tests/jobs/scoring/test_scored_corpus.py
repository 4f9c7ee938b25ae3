"""The scored corpus of a job: where it is, and how often its files are opened to plan it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pyarrow import fs

from jobs.corpus import sources
from jobs.pairs import PairsConfig
from jobs.rank import RankConfig
from jobs.scoring.scored_corpus import ScoredInput, ScoredOptions
from tests.jobs.conftest import write


class CountingHandler(fs.FSSpecHandler):  # type: ignore[misc]
    """The local filesystem, which counts how often each file is opened."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self._local = fs.LocalFileSystem()

    def get_type_name(self) -> str:
        return "counting"

    def __eq__(self, other: object) -> bool:
        return self is other

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return list(self._local.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return list(self._local.get_file_info(selector))

    def open_input_file(self, path: str) -> object:
        self.opened[Path(path).name] += 1
        return self._local.open_input_file(path)


@pytest.mark.parametrize("kind", [RankConfig, PairsConfig])
@pytest.mark.parametrize("model", ["tiny", None])
def test_planning_reads_each_footer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScoredOptions], model: str | None
) -> None:
    row = {"prompt": "hi", "response": "yes"} | ({} if model else {"score": 1.0})
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.parquet", [row])
    handler = CountingHandler()
    counting = fs.PyFileSystem(handler)
    monkeypatch.setattr(sources, "filesystem_of", lambda location: (counting, location))
    ScoredInput(kind(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=model))
    assert handler.opened == {"a.parquet": 1, "b.parquet": 1}


def test_the_scored_corpus_is_beside_the_output_and_never_its_own_input(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"prompt": "hi", "response": "yes"}])
    options = RankConfig(input=f"{tmp_path}/**/*.parquet", output=str(tmp_path / "out"), model="tiny")
    scored = tmp_path / "_out_scored"
    assert ScoredInput(options).location == str(scored)
    write(scored / "part-a.parquet", [{"prompt": "hi", "response": "yes", "score": 1.0}])
    assert [file.name for file in ScoredInput(options).corpus.files] == ["a.parquet"]


def test_a_corpus_that_an_earlier_version_scored_inside_the_output_is_taken_up_there(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "hi", "response": "yes"}])
    options = RankConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model="tiny")
    (tmp_path / "out" / "_scored").mkdir(parents=True)
    (tmp_path / "out" / "_scored" / "_manifest.json").write_text('{"identity": {}}')
    assert ScoredInput(options).location == str(tmp_path / "out" / "_scored")
