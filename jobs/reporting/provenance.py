"""Provenance of scores: the manifests of the folder that is read, and of those its rows come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.corpus.storage import folder_of
from jobs.runs.ledger import Ledger
from serve_app.reward_model.errors import RaywardError

logger = logging.getLogger(__name__)
MAX_FOLDERS = 8


@dataclass(frozen=True, slots=True)
class ScoringRecord:
    """A scoring run as its manifest tells it; None, or nothing, for what it does not tell.

    `seconds` are those of scoring alone, summed over actors and over the runs that were resumed; `elapsed_s` those of
    the last run with all it does.
    """

    model: str | None
    revision: str | None
    device: str | None
    dtype: str | None
    fingerprint: str | None
    prefix: str
    status: str | None
    rows: int
    errors: int
    tokens: int
    seconds: float
    elapsed_s: float | None
    versions: Mapping[str, str]
    not_computed: int = 0
    """Tokens of scores that were there before."""
    processors: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ScoringRecord:
        """Read it from the manifest of a scoring run."""
        identity, model = manifest["identity"], _mapping(manifest.get("model"))
        named = _mapping(manifest.get("arguments")).get("model")  # what manifests had that have no `model` of their own
        elapsed = _number(manifest.get("elapsed_s"))
        return cls(
            _text(model.get("name")) or _text(named),
            _text(model.get("revision")),
            _text(identity.get("device")),
            _text(identity.get("dtype")),
            _text(identity.get("model_fingerprint")),
            _text(identity.get("output_prefix")) or "",
            _text(manifest.get("status")),
            int(_number(manifest.get("rows"))),
            int(_number(manifest.get("errors"))),
            int(_number(manifest.get("tokens"))),
            _number(manifest.get("seconds")),
            elapsed or None,
            {key: str(value) for key, value in _mapping(manifest.get("versions")).items()},
            int(_number(manifest.get("tokens_not_computed"))),
            tuple(manifest.get("processors", ())),
        )

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that one actor scores in a second."""
        return (self.tokens - self.not_computed) / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Provenance:
    """The scoring runs that made some rows, the last one first; `is_selected` tells that the rows are pairs which
    `jobs.pairs` chose by their scores, so that all are right."""

    records: tuple[ScoringRecord, ...]
    is_selected: bool

    @classmethod
    def of(cls, location: str) -> Provenance:
        """The provenance of the rows at `location`; empty where no manifest tells."""
        manifests = list(_manifests(location))
        records = [ScoringRecord.of(manifest) for manifest in manifests if _is_scoring(manifest)]
        return cls(tuple(records), bool(manifests) and manifests[0]["identity"].get("job") == "pairs")


def _manifests(location: str) -> Iterator[dict[str, Any]]:
    """The manifest of a folder, then that of the folder its input was, and so on."""
    seen: set[str] = set()
    while location not in seen and len(seen) < MAX_FOLDERS:
        seen.add(location)
        try:
            manifest = Ledger(folder_of(location)).read_manifest()
        except (RaywardError, OSError) as error:
            logger.info("how %s was made is not told: %s", location, error)
            return
        if manifest is None:
            return
        yield manifest
        before = manifest["identity"].get("input")
        if not isinstance(before, str):  # of several inputs none is where the rows are from
            return
        location = before


def _is_scoring(manifest: Mapping[str, Any]) -> bool:
    return "model_fingerprint" in manifest["identity"]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
