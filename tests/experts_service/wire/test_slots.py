"""Slots have one owner at a time, and whoever stops waiting does not make them free."""

from __future__ import annotations

import random

import pytest

from experts_service.wire.slots import Slots


def test_the_lowest_slots_are_taken_again_and_again() -> None:
    """Memory that was touched once is used before memory that was not."""
    slots = Slots(8)
    assert [slots.take(1, 1), slots.take(2, 3), slots.take(3, 1)] == [0, 1, 4]
    slots.give_back(2)
    assert [slots.take(4, 2), slots.take(5, 2), slots.take(6, 1)] == [1, 5, 3]


def test_there_is_no_room_before_the_shard_has_replied() -> None:
    slots = Slots(4)
    assert slots.take(1, 4) == 0
    assert slots.take(2, 1) is None
    slots.give_back(2)  # it has none
    assert slots.take(3, 1) is None
    slots.give_back(1)
    slots.give_back(1)
    assert slots.take(4, 5) is None, "more than there are"
    assert slots.take(5, 4) == 0


@pytest.mark.parametrize("number", [1, 7, 64])
def test_no_slot_ever_has_two_owners(number: int) -> None:
    random_ = random.Random(number)
    slots, held = Slots(number), {}
    for request_id in range(5_000):
        if held and random_.random() < 0.5:
            gone = random_.choice(list(held))
            slots.give_back(gone)
            del held[gone]
        count = random_.choice((1, 1, 2, 5, number))
        taken = {slot for _, owned in held.items() for slot in owned}
        first = slots.take(request_id, count)
        runs = [at for at in range(number - count + 1) if not taken & set(range(at, at + count))]
        assert first == min(runs, default=None)
        if first is not None:
            held[request_id] = set(range(first, first + count))
        assert len(slots) == len(held)
