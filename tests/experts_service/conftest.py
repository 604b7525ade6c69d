"""Imports Ray Serve once, without what its own pydantic models warn about."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")
    import ray.serve  # noqa: F401
