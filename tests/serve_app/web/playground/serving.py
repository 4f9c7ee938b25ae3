"""The real application on loopback, in a thread of this process, for a browser to ask."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from serve_app.web.gate import http_app
from serve_app.web.security import Guard
from serve_app.web.service import ScoringService

START_TIMEOUT_S = 120.0


@contextmanager
def serving(service: ScoringService, guard: Guard | None = None) -> Iterator[str]:
    """The address of an endpoint that answers with `service`."""
    config = uvicorn.Config(
        http_app(service, guard or Guard([])), log_config=None, ws="none", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not server.started:
                assert thread.is_alive(), "the server has stopped"
                assert time.monotonic() < deadline, "the server has not started"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
