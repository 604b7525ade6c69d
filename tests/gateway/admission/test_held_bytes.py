"""The memory of requests that wait for an answer is shared by tenant, and bounded however many tenants there are."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from cluster.errors import Overloaded
from gateway.admission.held_bytes import MOST_TIMES, HeldBytes


def test_many_tenants_fill_no_more_than_is_bounded() -> None:
    """Without keys each connection is a tenant: two hundred of them held a message of 8 MiB each, past any bound."""
    held_bytes, taken = HeldBytes(100), 0
    with ExitStack() as stack:
        for tenant in range(50):
            with suppress(Overloaded):
                stack.enter_context(held_bytes.of(str(tenant))).add(40)
                taken += 40
        assert 100 < taken <= MOST_TIMES * 100
        with pytest.raises(Overloaded):
            stack.enter_context(held_bytes.of("0")).add(1)
    with held_bytes.of("eve") as held:
        held.add(100)
        with held_bytes.of("alice") as other:
            other.add(100)
            with pytest.raises(Overloaded):
                held.add(1)
        held.release()
        held.add(100)
