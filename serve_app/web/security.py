"""Who may use the endpoint: holders of an API key, or without keys this machine alone."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from serve_app.config import ServiceConfig
from serve_app.web.service import ApiError

KEYS_VARIABLE = "RAYWARD_API_KEYS"
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/docs", "/openapi.json"})


class InsecureBindError(Exception):
    """The endpoint would be open to other machines without API keys."""


class Guard:
    """Checks each request's key, in a time that does not tell how much of it was right."""

    def __init__(
        self, keys: Iterable[str], *, digests: Iterable[bytes] = (), allow_unauthenticated: bool = False
    ) -> None:
        # Digests have one length, so that a comparison does not tell a key's.
        self._digests = [*(_digest(key) for key in keys), *digests]
        self._open = allow_unauthenticated and not self._digests

    @classmethod
    def from_config(cls, config: ServiceConfig, digests: Iterable[bytes] = ()) -> Guard:
        """Keys from the configuration's file, this process's environment and `digests`. Several may be valid at once,
        so that they can be changed.
        """
        keys: list[str] = []
        if config.api_keys_file is not None:
            lines = [line.strip() for line in Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()]
            keys = [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise InsecureBindError(f"{config.api_keys_file} holds no API key")
        known = {*digests_from_environment(), *digests}
        return cls(keys, digests=known, allow_unauthenticated=config.allow_unauthenticated)

    def check_host(self, host: str | None) -> None:
        """Refuse to be served on `host` where anybody could ask. Raises `InsecureBindError`."""
        if not self._digests and not self._open and host is not None and not is_loopback(host):
            raise InsecureBindError(
                f"no API key is set and the HTTP host is {host}: set {KEYS_VARIABLE} or api_keys_file, bind 127.0.0.1, "
                "or set allow_unauthenticated where a gateway checks who asks"
            )

    def check(
        self, path: str, authorization: str | None, client_host: str | None, *, api_key: str | None = None
    ) -> None:
        """Let a request pass, or raise `ApiError` 401 or 403. `api_key` is the header X-API-Key."""
        if path in OPEN_PATHS or self._open:
            return
        if not self._digests:
            if client_host is not None and not is_loopback(client_host):
                raise ApiError(403, "without API keys only this machine may ask", "loopback_only")
            return
        # Every key is compared with every one given, whichever fits.
        given = [_digest(key.strip()) for key in (_key_in(authorization), api_key) if key is not None]
        fits = [hmac.compare_digest(key, digest) for key in given for digest in self._digests]
        if not any(fits):
            raise ApiError(
                401,
                "send a valid API key as 'Authorization: Bearer KEY', as 'X-API-Key: KEY', or as the password of an "
                "address, as in http://x:KEY@HOST",
                "invalid_api_key",
            )


def _key_in(authorization: str | None) -> str | None:
    """A bearer's key or a Basic password: clients that can send no header put the key into the address."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() != "basic":
        return None
    try:
        _user, _, password = base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return password


def digests_from_environment() -> list[bytes]:
    """Digests of the keys in `RAYWARD_API_KEYS`."""
    keys = (key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(","))
    return [_digest(key) for key in keys if key]


def is_loopback(host: str) -> bool:
    """Whether an address means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
