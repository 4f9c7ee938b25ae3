"""Keys, and where the endpoint may be bound without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import ServiceConfig
from serve_app.web.security import Guard, InsecureBindError, is_loopback
from serve_app.web.service import ApiError


def service(**options: object) -> ServiceConfig:
    return ServiceConfig.model_validate({"model": "tiny"} | options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_without_keys_it_is_bound_to_this_machine_alone(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_API_KEYS", raising=False)
    with pytest.raises(InsecureBindError, match="RAYWARD_API_KEYS"):
        Guard.from_config(service()).check_host(host)
    Guard.from_config(service()).check_host("127.0.0.1")
    Guard.from_config(service(allow_unauthenticated=True)).check_host(host)
    monkeypatch.setenv("RAYWARD_API_KEYS", "key")
    Guard.from_config(service()).check_host(host)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# those of the team\none\n\n two \n", encoding="utf-8")
    monkeypatch.setenv("RAYWARD_API_KEYS", "three, four,")
    guard = Guard.from_config(service(api_keys_file=str(keys)))
    for key in ("one", "two", "three", "four"):
        guard.check("/v1/score", f"Bearer {key}", "192.0.2.7")
    for key in ("", "# those of the team", "five", "one two"):
        with pytest.raises(ApiError) as raised:
            guard.check("/v1/score", f"Bearer {key}", "127.0.0.1")
        assert raised.value.status == 401


def test_a_file_without_keys_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_API_KEYS", raising=False)
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n", encoding="utf-8")
    with pytest.raises(InsecureBindError, match="no API key"):
        Guard.from_config(service(api_keys_file=str(empty)))


def test_keys_are_asked_for_although_open_access_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWARD_API_KEYS", "key")
    with pytest.raises(ApiError):
        Guard.from_config(service(allow_unauthenticated=True)).check("/v1/score", None, "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("x", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
