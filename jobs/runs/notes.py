"""Notes of a run's workers that its driver reads: when a model was loaded, and how many units are worked through.

They are in Ray's key-value store, which is there on every node and takes no process; without a Ray, as where a job's
parts run in one process, they are in this one. A note is for people to see: no result depends on it.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, TypeAlias

NAMESPACE = b"rayward"
Note: TypeAlias = dict[str, Any]

_here: dict[str, bytes] = {}
_worker = uuid.uuid4().hex


def note(run: str, **values: Any) -> None:
    """Put what this process has to tell of a run in the place of what it told before."""
    key, content = f"{run}/{_worker}", json.dumps(values).encode()
    store = _store()
    if store is None:
        _here[key] = content
    else:
        store._internal_kv_put(key.encode(), content, overwrite=True, namespace=NAMESPACE)


def notes_of(run: str) -> list[Note]:
    """The last note of each process of a run."""
    store = _store()
    if store is None:
        return [json.loads(content) for key, content in _here.items() if key.startswith(f"{run}/")]
    keys = store._internal_kv_list(f"{run}/".encode(), namespace=NAMESPACE)
    found = [store._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return [json.loads(content) for content in found if content is not None]


def forget(run: str) -> None:
    """Take the notes of a run away."""
    store = _store()
    if store is None:
        for key in [key for key in _here if key.startswith(f"{run}/")]:
            del _here[key]
    else:
        store._internal_kv_del(f"{run}/".encode(), del_by_prefix=True, namespace=NAMESPACE)


def _store() -> Any:
    """Ray's key-value store, where this process is connected to a Ray."""
    import sys

    if "ray" not in sys.modules:
        return None
    from ray.experimental import internal_kv

    return internal_kv if internal_kv._internal_kv_initialized() else None
