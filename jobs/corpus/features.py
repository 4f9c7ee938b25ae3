"""Schema metadata of a table whose columns are not all those of its input: the features that `datasets` reads."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

FEATURES_KEY = b"huggingface"


def described(schema: pa.Schema) -> dict[bytes, bytes]:
    """The metadata of a schema, with `datasets` features for exactly its columns.

    Features of columns that are there stay as they are (such as the names of a ClassLabel); a new column gets that of
    its Arrow type. Metadata that is not in the form of `datasets` stays untouched.
    """
    metadata: dict[bytes, bytes] = dict(schema.metadata or {})
    try:
        content = json.loads(metadata.get(FEATURES_KEY, b"null"))
        features = content["info"]["features"]
        known = dict(features.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        return metadata
    content["info"]["features"] = {
        field.name: _feature(field.type) if _is_other_time(known.get(field.name), field.type) else known[field.name]
        for field in schema
    }
    content.pop("fingerprint", None)  # that of the input's rows
    metadata[FEATURES_KEY] = json.dumps(content).encode()
    return metadata


def _is_other_time(feature: Any, kind: pa.DataType) -> bool:
    """Whether there is no feature, or one of timestamps in another unit than they were read in."""
    return feature is None or (
        pa.types.is_timestamp(kind) and isinstance(feature, dict) and feature.get("dtype") != _name(kind)
    )


def _feature(kind: pa.DataType) -> Any:
    """The feature of an Arrow type, in the form that every version of `datasets` reads."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_feature(kind.value_type)]
    return {"dtype": _name(kind), "_type": "Value"}


def _name(kind: pa.DataType) -> str:
    return {"float": "float32", "double": "float64", "halffloat": "float16"}.get(str(kind), str(kind))
