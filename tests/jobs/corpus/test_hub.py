"""Datasets of the Hub, against a stand-in for its HTTP API: one commit, by path or by split, and one-line errors."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus.files import Corpus, Plan
from jobs.corpus.reader import UnitReader
from jobs.corpus.sources import Source
from jobs.errors import CorpusError, OutputError
from jobs.runs.ledger import Ledger
from tests.jobs.hub import Hub, hub

REPO = "org/name"


def parquet(*ids: int) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"id": list(ids)}), content)
    return content.getvalue()


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub(monkeypatch) as content:
        yield content


def ids(source: Source | str, plan: Plan | None = None) -> list[int]:
    corpus = Corpus.open(source, plan=plan) if plan else Corpus.open(source)
    reader = pickle.loads(pickle.dumps(UnitReader(corpus.filesystem)))  # as it travels to a worker
    tables = [table for _, table in reader.read(corpus.shared_units(10))]
    assert all(isinstance(table, pa.Table) for table in tables), tables
    return [number for table in tables for number in table["id"].to_pylist()]


def of(location: str, split: str | None = None, config: str | None = None) -> Source:
    return Source((location,), split=split, config=config)


def test_a_path_a_glob_and_a_revision_are_read(the_hub: Hub) -> None:
    files = {"data/train-0.parquet": parquet(1), "data/train-1.parquet": parquet(2), "other.parquet": parquet(3)}
    the_hub.push(REPO, files)
    the_hub.push(REPO, {"default/train/0000.parquet": parquet(9)}, branch="refs/convert/parquet")
    assert ids("hf://datasets/org/name/data") == [1, 2]
    assert ids("hf://datasets/org/name/data/*-1.parquet") == [2]
    assert ids("hf://datasets/org/name/other.parquet") == [3]
    assert ids("hf://datasets/org/name") == [1, 2, 3]
    for revision in ("refs/convert/parquet", "refs%2Fconvert%2Fparquet"):
        assert ids(f"hf://datasets/org/name@{revision}/default") == [9]


def test_a_restart_reads_the_commit_that_it_began_with(the_hub: Hub) -> None:
    sha = the_hub.push(REPO, {"train.parquet": parquet(1)})
    corpus = Corpus.open("hf://datasets/org/name")
    assert corpus.identity == {"input_commits": {"org/name@main": sha}}
    plan = Plan.read(Plan.of(corpus, corpus.units(10), shares=True).text())
    the_hub.push(REPO, {"train.parquet": parquet(2)})
    assert ids("hf://datasets/org/name", plan) == [1]
    assert ids("hf://datasets/org/name") == [2]


@pytest.mark.parametrize(
    ("files", "split", "config", "found"),
    [
        (("train.parquet", "test.parquet"), "train", None, [0]),
        (
            ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"),
            "train",
            None,
            [0, 1],
        ),
        (("en/train/0.parquet", "de/train/0.parquet", "de/dev/0.parquet"), "train", "de", [1]),
        (("en/train/0.parquet", "de/train/0.parquet", "de/dev/0.parquet"), "validation", "de", [2]),
    ],
)
def test_a_split_is_found_by_the_names_of_files(
    the_hub: Hub, files: tuple[str, ...], split: str, config: str | None, found: list[int]
) -> None:
    the_hub.push(REPO, {name: parquet(place) for place, name in enumerate(files)} | {"README.md": b"# A dataset"})
    assert ids(of(REPO, split, config)) == found


CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: [one/*.parquet, two.parquet]
  - split: test
    path: "three/**"
- config_name: other
  data_dir: four
  data_files: "*.parquet"
---
# A dataset
"""


def test_the_card_says_what_a_split_is(the_hub: Hub) -> None:
    names = ("one/a.parquet", "two.parquet", "three/x/b.parquet", "four/test.parquet")
    the_hub.push(REPO, {name: parquet(place) for place, name in enumerate(names)} | {"README.md": CARD})
    assert ids(of(REPO, "train")) == [0, 1]
    assert ids(of(REPO, "test")) == [2]
    assert ids(of(REPO, "train", "other")) == [3]
    for source, message in {
        of(REPO, "dev"): r"no split dev; its card names train, test",
        of(REPO, "train", "third"): r"no configuration third; its card names default, other",
    }.items():
        with pytest.raises(CorpusError, match=message):
            Corpus.open(source)


def test_what_is_not_there_is_one_line(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    the_hub.push(REPO, {"train.parquet": parquet(1)})
    told = {
        of("org/none", "train"): "there is no dataset org/none@main on the Hub, or it is private",
        of("hf://datasets/org/name@v9"): "org/name@v9 has no such revision",
        of("hf://datasets/org/name/none"): "hf://datasets/org/name@.*/none does not exist",
        of("hf://datasets/name"): "is no dataset of the Hub: write hf://datasets/ORG/NAME",
        of(REPO, "test"): "no file of the split test; there are train",
        of(REPO): "a dataset of the Hub needs --split, as in --input org/name --split train",
    }
    for source, message in told.items():
        with pytest.raises(CorpusError, match=message) as caught:
            Corpus.open(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="the Hub is read here"):
        Ledger("hf://datasets/org/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CorpusError, match="org/name@main cannot be read from the Hub: ") as caught:
        Corpus.open(of(REPO, "train"))
    assert "\n" not in str(caught.value)


def test_an_id_with_a_split_is_the_same_input_as_its_uri(the_hub: Hub) -> None:
    assert of(REPO, "train").identity == {"input": "hf://datasets/org/name", "split": "train"}
    assert of("hf://datasets/org/name/", "train").identity == of(REPO, "train").identity


def test_all_splits_of_a_dataset_are_said_aloud(the_hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    the_hub.push(REPO, {"train.parquet": parquet(1), "test.parquet": parquet(2)})
    with caplog.at_level(logging.WARNING):
        assert ids("hf://datasets/org/name") == [2, 1]
    assert "test (1 file) and train (1 file)" in caplog.text
