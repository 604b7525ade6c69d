"""The pool of a coordinator's experts, as far as it needs no Ray."""

from __future__ import annotations

import gc

import pytest

from experts_service.client import ExpertPool


def test_nothing_is_left_pending_when_a_pool_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """`manta bench decode` ended with "Task was destroyed but it is pending!", of the one that looks at suspects."""
    for _ in range(20):
        pool = ExpertPool([])
        pool.connect(timeout_s=60)
        pool.close()
        pool.close()
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []
