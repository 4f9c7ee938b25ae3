"""How the scores were made: the manifests of the folder that is read, and of those its rows come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.corpus.files import filesystem_of
from jobs.runs.ledger import Ledger
from serve_app.reward_model.errors import RaywardError

__all__ = ["Provenance", "ScoringRecord"]

logger = logging.getLogger(__name__)
MAX_FOLDERS = 8


@dataclass(frozen=True, slots=True)
class ScoringRecord:
    """What the manifest of a scoring run says; None, or nothing, for what it does not.

    `seconds` are those of scoring alone, summed over actors and over the runs that were taken up; `elapsed_s` those of
    the last run with all it does.
    """

    model: str | None
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

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ScoringRecord:
        """Read it from the manifest of a scoring run."""
        identity, arguments = manifest["identity"], _mapping(manifest.get("arguments"))
        elapsed = _number(manifest.get("elapsed_s"))
        return cls(
            _text(arguments.get("model")) or _text(_mapping(manifest.get("model")).get("name")),
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
        )

    @property
    def tokens_per_s(self) -> float | None:
        """What one actor scores in a second."""
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Provenance:
    """The scoring runs that made some rows, the last one first; `is_selected` tells that the rows are pairs which
    `jobs.pairs` chose by their scores, so that all are right."""

    records: tuple[ScoringRecord, ...]
    is_selected: bool

    @classmethod
    def of(cls, location: str) -> Provenance:
        """That of the rows at `location`; empty where no manifest tells."""
        manifests = list(_manifests(location))
        records = [ScoringRecord.of(manifest) for manifest in manifests if _is_scoring(manifest)]
        return cls(tuple(records), bool(manifests) and manifests[0]["identity"].get("job") == "pairs")


def _manifests(location: str) -> Iterator[dict[str, Any]]:
    """The manifest of a folder, then that of the folder its input was, and so on."""
    seen: set[str] = set()
    while location not in seen and len(seen) < MAX_FOLDERS:
        seen.add(location)
        try:
            manifest = Ledger(_folder(location)).read_manifest()
        except (RaywardError, OSError) as error:
            logger.info("how %s was made is not told: %s", location, error)
            return
        if manifest is None:
            return
        yield manifest
        location = str(manifest["identity"].get("input", ""))


def _folder(location: str) -> str:
    """The folder of a location that may be a file or a glob."""
    address, mark, options = location.partition("?") if "://" in location else (location, "", "")
    if "*" in address or address.endswith(".parquet"):
        filesystem_of(location)  # raises where this is no location
        address = address.partition("*")[0].rpartition("/")[0] or "."
    return address + mark + options


def _is_scoring(manifest: Mapping[str, Any]) -> bool:
    return "model_fingerprint" in manifest["identity"]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
