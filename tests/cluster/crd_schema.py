"""KubeRay's published CRDs as JSON schemas that refuse what Kubernetes would drop in silence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator

__all__ = ["strict_validator"]


@cache
def strict_validator(crds: Path, kind: str) -> Validator:
    """Checks documents of a kind's `v1`; a key that it does not know is an error.

    A CRD's schema lets unknown keys pass, and the API server prunes them: a misspelt option would go unnoticed. Keys
    stay free where `x-kubernetes-preserve-unknown-fields` says so, in maps, and in the object's own metadata.
    """
    document = yaml.load((crds / f"ray.io_{kind.lower()}s.yaml").read_text("utf-8"), Loader=_FAST)
    (version,) = [version for version in document["spec"]["versions"] if version["name"] == "v1"]
    schema: dict[str, Any] = _closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return Draft202012Validator(schema)


_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # Below `properties` and the like keys are names of fields, not words of JSON schema.
    closed = {
        key: {name: _closed(field) for name, field in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
        if key not in ("default", "enum", "required")
    }
    closed |= {key: schema[key] for key in ("enum", "required") if key in schema}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed
