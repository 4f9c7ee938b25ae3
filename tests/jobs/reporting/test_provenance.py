"""How scores were made, as the manifests tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.reporting.provenance import Provenance


def manifest(folder: Path, identity: dict[str, Any], **more: Any) -> Path:
    folder.mkdir()
    (folder / "_manifest.json").write_text(json.dumps({"identity": identity, **more}))
    return folder


def test_the_run_that_scored_is_found_behind_the_one_that_ranked(tmp_path: Path) -> None:
    identity = {"model_fingerprint": "ab", "device": "cpu", "dtype": "bfloat16", "input": str(tmp_path / "gone")}
    made = manifest(tmp_path / "scored", identity, tokens=300, seconds=2.0, rows=4, arguments={"model": "tiny"})
    ranked = manifest(tmp_path / "ranked", {"job": "rank", "input": str(made)})
    for location in (ranked, f"{ranked}/*.parquet", f"{ranked}/part-0.parquet", f"file://{ranked}"):
        found = Provenance.of(str(location))
        (record,) = found.records
        assert (record.model, record.device, record.tokens_per_s, record.rows) == ("tiny", "cpu", 150.0, 4)
        assert not found.is_selected


def test_the_model_that_no_option_named_is_the_manifests(tmp_path: Path) -> None:
    model = {"name": "tiny", "revision": "abc", "fingerprint": "ab"}
    made = manifest(tmp_path / "scored", {"model_fingerprint": "ab"}, model=model, arguments={"model": None})
    (record,) = Provenance.of(str(made)).records
    assert (record.model, record.revision, record.fingerprint) == ("tiny", "abc", "ab")


def test_pairs_that_were_made_of_scores_are_known(tmp_path: Path) -> None:
    assert Provenance.of(str(manifest(tmp_path / "pairs", {"job": "pairs", "input": "gone"}))).is_selected


def test_what_is_no_manifest_tells_nothing(tmp_path: Path) -> None:
    assert Provenance.of(str(tmp_path)).records == ()
    (tmp_path / "_manifest.json").write_text("[]")
    assert Provenance.of(str(tmp_path)).records == ()
    loop = manifest(tmp_path / "loop", {"job": "rank", "input": str(tmp_path / "loop")})
    assert Provenance.of(str(loop)).records == ()
    odd = {"model_fingerprint": 3, "input": 4}
    (record,) = Provenance.of(str(manifest(tmp_path / "odd", odd, tokens="many", arguments=[], seconds=None))).records
    assert (record.fingerprint, record.tokens, record.tokens_per_s) == (None, 0, None)
