"""jobs.report on a local Ray: what it finds, what the page shows in a real browser, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import CorpusError, MissingPackageError, OutputError
from jobs.report import ReportConfig, main, run
from tests.browser import chromium
from tests.jobs.conftest import write
from tests.jobs.reporting.corpora import scored

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.usefixtures("local_ray")

HOSTILE = "</pre></svg><script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\"> \u8bd7"
HOSTILE += "w" * 150
DOMAIN = "\u9886\u57df $x^2$ <b>&\"'_"


def config(tmp_path: Path, **options: Any) -> ReportConfig:
    return ReportConfig(**{"input": str(tmp_path / "in"), "output": str(tmp_path / "report.html"), **options})


def text_of(tmp_path: Path) -> str:
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def headings(tmp_path: Path) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text_of(tmp_path))


def write_tables(folder: Path, table: pa.Table, *ends: int) -> None:
    """Files that hold the rows up to each of `ends`, and the rest."""
    folder.mkdir()
    for number, (first, last) in enumerate(zip((0, *ends), (*ends, table.num_rows), strict=True)):
        pq.write_table(table.slice(first, last - first), folder / f"{number}.parquet")


def test_scores_after_each_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [[1.0, 2.0], [3.0, 4.5, 6.0], None]
    table = pa.table(
        {"score": pa.array([2.0, 6.0, None], pa.float32()), "turn_scores": pa.array(scores, pa.list_(pa.float32()))}
    )
    write_tables(tmp_path / "in", table, 1)
    run(config(tmp_path))
    assert "mean after each answer (conversations): 2 (2), 3.25 (2), 6 (1)" in capsys.readouterr().out
    assert "Scores after each answer" in headings(tmp_path)
    assert re.search(r"<th[^>]*>2</th>\s*<td[^>]*>2</td>\s*<td[^>]*>3.25</td>", text_of(tmp_path))


@pytest.fixture(scope="module")
def real_page(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A report of real candidates in three files, with scores that like right answers and long ones; some rows are
    hostile."""
    folder = tmp_path_factory.mktemp("real")
    table = pq.read_table(shared / "data" / "rm_bench_candidates.parquet").slice(0, 1200)
    lengths = np.array([len(text) // 4 + 9 for text in table["response"].to_pylist()])
    chooser = np.random.default_rng(6)
    scores = chooser.normal(0, 1, len(lengths)) + table["preferred"].to_numpy() + np.log2(lengths) / 3
    scores[[5, 77]] = 9, -9
    responses = [HOSTILE if place in (5, 77) else text for place, text in enumerate(table["response"].to_pylist())]
    domains = [DOMAIN if domain == "chat" else domain for domain in table["domain"].to_pylist()]
    errors = [f"TooLongError: {HOSTILE}" if place % 100 == 3 else None for place in range(len(lengths))]
    table = table.drop_columns(["response", "domain"])
    table = table.append_column("response", pa.array(responses)).append_column("domain", pa.array(domains))
    kept = [None if error else float(score) for score, error in zip(scores, errors, strict=True)]
    table = table.append_column("score", pa.array(kept, pa.float32()))
    table = table.append_column("num_tokens", pa.array(lengths, pa.int32())).append_column("error", pa.array(errors))
    write_tables(folder / "in", table, 500, 500, 801)
    run(config(folder))
    return folder


def test_real_candidates_are_told_as_a_plain_computation_tells_them(real_page: Path) -> None:
    found = run(config(real_page, output=str(real_page / "again.html")))
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((real_page / "in").glob("*.parquet"))).to_pylist()
    right = pairs = 0
    for prompt in {row["prompt"] for row in rows}:
        own = [row for row in rows if row["prompt"] == prompt and row["score"] is not None]
        for chosen, rejected in product([r for r in own if r["preferred"]], [r for r in own if not r["preferred"]]):
            pairs += 1
            right += chosen["score"] > rejected["score"]
    assert found.pairs is not None
    assert (found.pairs.counts["score"].num_pairs, found.pairs.counts["score"].right) == (pairs, right)
    best = [row for row in rows if row["score"] is not None]
    best.sort(key=lambda row: -row["score"])
    assert [shown.prompt for shown in found.best["score"]] == [_cut(row["prompt"]) for row in best[:5]]
    assert [shown.score for shown in found.worst["score"]] == [row["score"] for row in best[:-6:-1]]
    assert (found.best["score"][0].file, found.best["score"][0].row) == ("0.parquet", 5)
    # The same input gives the same page, to the byte.
    assert (real_page / "again.html").read_bytes() == (real_page / "report.html").read_bytes()
    assert headings(real_page) == ["Scores", "Pairs", "By domain", "Best and worst rows", "Rows without a score"]


def _cut(text: str) -> str:
    return text if len(text) <= 264 else f"{text[:240].rstrip()} \u2026 [{len(text) - 240:,} more characters]"


def test_every_text_is_escaped_and_every_id_is_there_once(real_page: Path) -> None:
    text = text_of(real_page)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;document.title" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!#)', text)  # nothing is loaded
    assert len(text) < 300_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_a_browser_shows_it_on_a_phone_and_on_a_desktop(
    real_page: Path, browser: Browser, width: int, scheme: Any
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto((real_page / "report.html").as_uri())
    assert page.title() == "Scores of in"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawings = page.locator("figure svg")
    assert drawings.count() == 8
    for drawing in drawings.all():
        box = drawing.bounding_box()
        assert box is not None
        assert 200 < box["width"] < width
        assert box["height"] > 50
    # Letters in figures are no smaller than those of a footnote.
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(text => parseFloat(getComputedStyle(text)"
        ".fontSize) * text.ownerSVGElement.getScreenCTM().a))"
    )
    assert smallest > 9
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == ("rgb(155, 166, 177)" if scheme == "dark" else "rgb(86, 96, 107)")
    assert page.locator(".response", has_text="<script>document.title = 'run'</script>").count() == 2
    assert page.locator("figure svg text", has_text="\u9886\u57df $x^2$ <b>").count() == 2
    page.click("summary")
    assert page.locator("details table").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert complaints == []


def test_real_conversations_with_chosen_and_rejected_rows_need_no_options(tmp_path: Path, shared: Path) -> None:
    # Chosen responses and rejected ones to the same prompts are in different files.
    files = [pq.read_table(shared / "data" / "hh_harmless" / f"part-0{place}.parquet").slice(0, 90) for place in (0, 1)]
    table = pa.concat_tables(files)
    table = table.append_column("my score", pa.array(np.arange(table.num_rows), pa.int64()))
    write_tables(tmp_path / "in", table, 90)
    found = run(config(tmp_path, num_examples=0))
    assert found.columns.label is not None
    assert found.columns.label.name == "label"
    assert found.pairs is not None
    counts = found.pairs.counts["my score"]
    pairs: dict[str, dict[str, list[int]]] = {}
    for place, row in enumerate(table.to_pylist()):
        prompt = str(row["messages"][:-1])
        pairs.setdefault(prompt, {"chosen": [], "rejected": []})[row["label"]].append(place)
    expected = [pair for own in pairs.values() for pair in product(own["chosen"], own["rejected"])]
    assert counts.num_pairs == len(expected) > 80
    assert counts.right == sum(chosen > rejected for chosen, rejected in expected)
    assert headings(tmp_path) == ["Scores", "Pairs"]
    assert "Length" not in text_of(tmp_path)
    assert str(table["messages"][0].as_py()[0]["content"]) not in text_of(tmp_path)  # --num-examples 0: no text


def test_two_columns_of_scores_are_compared_row_by_row(tmp_path: Path, shared: Path) -> None:
    table = pq.read_table(shared / "data" / "preference_pairs_zh_en.parquet").slice(0, 60)
    chosen = np.random.default_rng(1).normal(5, 1, 60).astype(np.float32)
    rejected = np.random.default_rng(2).normal(3, 1, 60).astype(np.float32)
    table = table.append_column("chosen_score", pa.array(chosen)).append_column("rejected_score", pa.array(rejected))
    table = table.append_column("half", pa.array(["a", "b"] * 30))
    write_tables(tmp_path / "in", table, 20)
    found = run(config(tmp_path, by=("half",), num_examples=1))
    assert found.pairs is not None
    (counts,) = found.pairs.counts.values()
    assert (counts.num_pairs, counts.right) == (60, (chosen > rejected).sum())
    assert headings(tmp_path) == [
        "Pairs",
        "Pairs by half",
        *(
            f"{name} \u00b7 {title}"
            for name in ("chosen_score", "rejected_score")
            for title in ("Scores", "By half", "Best and worst rows")
        ),
    ]
    best = table.slice(int(chosen.argmax()), 1).to_pylist()[0]["chosen"][-1]["content"]
    assert (found.best["chosen_score"][0].response or "")[:200] == best[:200]


def test_a_corpus_may_have_no_rows_no_scores_or_one_score_for_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = scored(40)
    write_tables(tmp_path / "in", table.slice(0, 0))
    assert run(config(tmp_path)).scales.num_rows == 0
    assert "The corpus has no rows." in text_of(tmp_path)
    none = table.set_column(table.column_names.index("score"), "score", pa.nulls(40, pa.float32()))
    write_tables(tmp_path / "none", none)
    run(config(tmp_path, input=str(tmp_path / "none")))
    assert "No row has a score." in text_of(tmp_path)
    assert headings(tmp_path) == ["Rows without a score"]
    assert "No row has a score.\n" in capsys.readouterr().out
    one = table.set_column(table.column_names.index("score"), "score", pa.array([2.5] * 40))
    write_tables(tmp_path / "one", one)
    found = run(config(tmp_path, input=str(tmp_path / "one")))
    assert found.best["score"] == []
    assert found.pairs is not None
    assert found.pairs.counts["score"].accuracy == 0.5
    assert "there is no trend" in text_of(tmp_path)


def test_the_command_line_writes_the_page_and_tells_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"\u8bc4 $\u5206$.x": float(place % 9), "my.group": place % 2, "\u8bed\u8a00": "\u4e2d"} for place in range(30)
    ]
    write(tmp_path / "a.parquet", rows)
    target = tmp_path / "new" / "report.html"
    words = [
        "--input",
        str(tmp_path / "a.parquet"),
        "--output",
        f"file://{target}",
        "--score-column",
        "\u8bc4 $\u5206$.x",
    ]
    monkeypatch.setattr("sys.argv", ["jobs.report", *words, "--by", "my.group", "\u8bed\u8a00", "--title", "<T>"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "30 rows\n\u8bc4 $\u5206$.x: 30 scored, 0 not\n  median 3, 90 % from 0 to 8\n" in printed
    assert "report.html: " in printed
    assert '<h1 dir="auto">&lt;T&gt;</h1>' in target.read_text(encoding="utf-8")
    assert "By my.group" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    monkeypatch.setattr("sys.argv", ["jobs.report", "--input", str(tmp_path / "a.parquet"), "--output", str(target)])
    assert main() == 1
    assert "has no column 'score', and its columns of numbers are" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["jobs.report", "--input", "a", "--output", "a.parquet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_what_cannot_be_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path / "in", scored(5))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="is a folder; name a file in it"):
        run(config(tmp_path))
    (tmp_path / "report.html").rmdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        run(config(tmp_path, output=str(tmp_path / "file" / "report.html")))
    with pytest.raises(CorpusError, match="domain' for --label"):
        run(config(tmp_path, label="no domain"))
    with pytest.raises(CorpusError, match="has the values .*; labels are booleans"):
        run(config(tmp_path, label="domain"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(MissingPackageError, match=r"the report needs matplotlib, .* pip install 'rayward\[report\]'"):
        run(config(tmp_path))
