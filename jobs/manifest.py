"""The manifest of a run, written when it begins, when it stops and when it is complete."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from jobs.ledger import Ledger

__all__ = ["is_complete", "recorded"]


@contextmanager
def recorded(ledger: Ledger, *, identity: Mapping[str, Any], arguments: BaseModel) -> Iterator[dict[str, Any]]:
    """Take the output folder over for a run; what the run puts into the dictionary ends up in the manifest.

    Raises:
        OutputError: the folder cannot be written.
    """
    manifest = {
        "identity": dict(identity),
        "status": "running",
        "arguments": arguments.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("rayward", "ray", "torch", "transformers")},
    }
    ledger.begin(manifest)
    started = time.monotonic()
    results: dict[str, Any] = {}
    try:
        yield results
    except BaseException as error:
        ledger.stop(manifest | {"status": "stopped", "reason": f"{type(error).__name__}: {error}"})
        raise
    results["elapsed_s"] = round(time.monotonic() - started, 3)
    ledger.finish(manifest | {"status": "complete"} | results)


def is_complete(ledger: Ledger) -> bool:
    """Whether the run that wrote the manifest came to its end."""
    return (ledger.read_manifest() or {}).get("status") == "complete"
