"""The page at /docs, which loads nothing: every route with its fields and an example, from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

PATH = "/docs"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
h2 { margin-top: 2.5rem }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid #8886; border-radius: 4px }
table { border-collapse: collapse; width: 100% }
td { text-align: left; vertical-align: top; padding: 0.2rem 0.75rem 0.2rem 0 }
details { border-bottom: 1px solid #8884; padding: 0.4rem 0 }
summary { cursor: pointer }
summary code { font-weight: 600 }
"""


def reference(app: FastAPI) -> APIRouter:
    """The route of the page on `app`'s own routes."""
    router = APIRouter()

    @router.get(PATH, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers=HEADERS)

    return router


def page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    title = escape(document["info"]["title"])
    about = "".join(f"<p>{escape(part)}</p>" for part in document["info"].get("description", "").split("\n\n"))
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            group = operation.get("tags", ["other"])[0]
            groups.setdefault(group, []).append(_operation(document, path, method, operation))
    body = "".join(f"<h2>{escape(group)}</h2>{''.join(operations)}" for group, operations in groups.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: routes</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f'<h1>{title}</h1>{about}<p><a href="openapi.json">openapi.json</a> has all this for programs.</p>{body}'
    )


def _operation(document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    asked = _schema(operation.get("requestBody"))
    answers = operation["responses"]
    parts = [f"<p>{escape(operation['description'])}</p>" if "description" in operation else ""]
    if asked:
        parts += ["<h4>Body</h4>", _fields(document, asked), _example(document, path, asked)]
    if answered := _schema(answers.get("200")):
        parts += ["<h4>Answer</h4>", _fields(document, answered)]
    errors = {status: answer for status, answer in answers.items() if status != "200"}
    rows = "".join(f"<tr><td>{status}<td>{escape(answer['description'])}" for status, answer in errors.items())
    parts.append(f"<h4>Errors</h4><table>{rows}</table>" if rows else "")
    head = f"<code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}"
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _schema(message: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a request's or an answer's JSON body; empty where it has none."""
    content: Mapping[str, Any] = (message or {}).get("content", {})
    return dict(content.get("application/json", {}).get("schema", {}))


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _objects(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The objects that a body may be, itself or as the items of a list."""
    schema = _resolved(document, schema)
    if "properties" in schema:
        yield schema
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), schema.get("items") or {}):
        yield from _objects(document, part) if part else ()


def _fields(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    tables = []
    for found in _objects(document, schema):
        required = found.get("required", ())
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code>{'' if name in required else ' <small>(optional)</small>'}"
            f"<td>{escape(_kind(document, field))}<td>{escape(field.get('description', ''))}"
            for name, field in found["properties"].items()
        )
        tables.append(f"<table>{rows}</table>")
    return "".join(tables) or f"<p>{escape(_kind(document, schema))}</p>"


def _kind(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A field's type in words: `list of string`."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(document, option) for option in options))
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_kind(document, schema.get('items', {}))}"
    return str(schema.get("type", "anything"))


def _example(document: Mapping[str, Any], path: str, schema: Mapping[str, Any]) -> str:
    examples = [example for found in _objects(document, schema) for example in found.get("examples", ())]
    if not examples:
        return ""
    text = json.dumps(examples[0], ensure_ascii=False, indent=2).replace("'", "'\\''")
    return f"<pre>curl 127.0.0.1:8000{escape(path)} -H 'Content-Type: application/json' -d '{escape(text)}'</pre>"
