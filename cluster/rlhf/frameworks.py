"""Modules of trainers, imported where they are used; none of them is a dependency of rayward."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cluster.rlhf.errors import FrameworkError

__all__ = ["framework_module"]


def framework_module(name: str, *, install: str) -> Any:
    """The module of that name. Raises FrameworkError, which tells how to `install` it, where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise FrameworkError(f"{name} cannot be imported ({error}): {install}") from error
