"""Status routes of vLLM and SGLang, which clients and load balancers ask first: alive, which version, how busy.

`/health` and `/v1/models` are rayward's own (`api.py`).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.web.service import ScoringService


def routes(service: ScoringService) -> APIRouter:
    """`GET` and `HEAD` of the routes, answered by `service`."""
    router = APIRouter(tags=["dialects"])

    async def ready() -> JSONResponse:
        """200 once every model can score, 503 until then."""
        is_ready = all((await service.ready()).values())
        return JSONResponse({}, status_code=200 if is_ready else 503)

    async def release() -> dict[str, str]:
        """rayward's version."""
        return {"version": _version()}

    async def model_info() -> dict[str, Any]:
        """The default model."""
        name = service.model_name(None)
        return {"model_path": name, "tokenizer_path": name, "is_generation": False, "max_tokens": _limit(name)}

    async def server_info() -> dict[str, Any]:
        """The models and the version."""
        models = {name: {"max_tokens": _limit(name)} for name in service.model_names}
        return {"version": _version(), "model_path": service.model_name(None), "models": models}

    async def load(request: Request) -> dict[str, int]:
        """The requests that this process works on, this one left out."""
        return {"server_load": max(0, getattr(request.state, "in_flight", 1) - 1)}

    def _limit(name: str) -> int:
        return service.max_tokens(name)

    table: dict[str, Any] = {
        "/ping": ready,
        "/health_generate": ready,
        "/version": release,
        "/get_model_info": model_info,
        "/model_info": model_info,
        "/server_info": server_info,
        "/get_server_info": server_info,
        "/load": load,
    }
    for path, answer in table.items():
        name = path.strip("/")
        router.add_api_route(path, answer, methods=["GET"], response_model=None, operation_id=name, summary=path)
        router.add_api_route(path, answer, methods=["HEAD"], response_model=None, include_in_schema=False)
    return router


def _version() -> str:
    try:
        return version("rayward")
    except PackageNotFoundError:
        return "unknown"
