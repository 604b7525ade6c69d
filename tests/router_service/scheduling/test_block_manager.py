"""Blocks: nothing is lost, nothing is held twice, and equal beginnings share."""

from hypothesis import given
from hypothesis import strategies as st

from router_service.scheduling.block_manager import NULL_BLOCK, BlockManager
from tests.router_service.requests import make_sequence

BLOCK = 4


def computed(manager: BlockManager, tokens: list[int], salt: str = "") -> object:
    sequence = make_sequence(tokens, cache_salt=salt)
    manager.take_prefix(sequence)
    assert manager.grow(sequence, len(tokens))
    sequence.num_computed_tokens = len(tokens)
    manager.publish(sequence)
    return sequence


def test_a_second_sequence_takes_the_full_blocks_of_the_first():
    manager = BlockManager(8, BLOCK)
    first = computed(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert manager.take_prefix(second) == 8
    assert second.block_table == first.block_table[:2]
    assert manager.num_used_blocks == 3


def test_at_least_one_token_is_left_to_compute():
    manager = BlockManager(8, BLOCK)
    computed(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    assert manager.take_prefix(make_sequence([1, 2, 3, 4, 5, 6, 7, 8])) == 4


def test_freed_blocks_are_found_again_until_they_are_reused():
    manager = BlockManager(4, BLOCK)
    manager.free(computed(manager, [1, 2, 3, 4, 5]))
    assert manager.num_used_blocks == 0
    again = make_sequence([1, 2, 3, 4, 9])
    assert manager.take_prefix(again) == 4
    manager.free(again)
    manager.free(computed(manager, list(range(100, 116))))  # all four blocks
    assert manager.take_prefix(make_sequence([1, 2, 3, 4, 9])) == 0


def test_another_salt_shares_nothing():
    manager = BlockManager(8, BLOCK)
    computed(manager, [1, 2, 3, 4, 5], salt="alice")
    assert manager.take_prefix(make_sequence([1, 2, 3, 4, 5], cache_salt="bob")) == 0
    assert manager.take_prefix(make_sequence([1, 2, 3, 4, 5], cache_salt="alice")) == 4


def test_a_block_deeper_in_a_sequence_depends_on_all_before_it():
    manager = BlockManager(8, BLOCK)
    computed(manager, [1, 2, 3, 4, 5, 6, 7, 8, 0])
    assert manager.take_prefix(make_sequence([9, 9, 9, 9, 5, 6, 7, 8, 0])) == 0


def test_too_few_blocks_changes_nothing():
    manager = BlockManager(2, BLOCK)
    sequence = make_sequence(range(9))
    assert not manager.grow(sequence, 9)
    assert not sequence.block_table
    assert manager.num_free_blocks == 2


def test_nobody_gets_the_null_block():
    manager = BlockManager(3, BLOCK)
    sequence = make_sequence(range(12))
    assert manager.grow(sequence, 12)
    assert sorted(sequence.block_table) == [1, 2, 3]
    assert NULL_BLOCK not in sequence.block_table


def test_a_doubted_block_does_not_come_back_while_somebody_holds_it():
    """Two held one block; one of them failed and its blocks were forgotten, and the other published them again."""
    manager = BlockManager(8, BLOCK)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first, second = computed(manager, prompt), computed(manager, prompt)
    assert first.block_table[0] == second.block_table[0]
    manager.doubt(first.block_table)
    manager.free(first)
    second.token_ids += [10, 11, 12]
    assert manager.grow(second, 12)
    second.num_computed_tokens = 12
    manager.publish(second)
    assert manager.take_prefix(make_sequence([*prompt, 10, 11, 12, 13])) == 0
    manager.free(second)
    again = make_sequence(prompt)
    assert manager.take_prefix(again) == 0
    computed(manager, prompt)
    assert manager.take_prefix(again) == 8, "once nobody held them, the blocks were as good as any"


def test_nothing_is_published_that_was_computed_beside_a_doubted_block_even_after_the_window_left_it():
    manager = BlockManager(8, BLOCK)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first, second = computed(manager, prompt), computed(manager, prompt)
    manager.doubt(first.block_table[:1])
    manager.free(first)
    manager.release(second, 6)
    second.token_ids += [10, 11, 12]
    assert manager.grow(second, 12)
    second.num_computed_tokens = 12
    manager.publish(second)
    assert len(manager.find_prefix(make_sequence([*prompt, 10, 11, 12, 13]))) == 0
    assert manager._hash_of_block.keys() <= set(second.block_table[1:2])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14)), max_size=60))
def test_every_block_is_free_or_held_never_both(actions):
    """Any order of arrivals, growth and departures over few tokens (so that prefixes collide often)."""
    manager = BlockManager(6, 2)
    held = []
    for action, amount in actions:
        if action == 0:
            sequence = make_sequence([token % 2 for token in range(amount)])
            cached = manager.take_prefix(sequence)
            if manager.grow(sequence, amount):
                assert cached < amount
                sequence.num_computed_tokens = amount
                manager.publish(sequence)
                held.append(sequence)
            else:
                manager.free(sequence)
        elif held and action == 1:
            manager.free(held.pop(amount % len(held)))
        elif held:
            sequence = held[amount % len(held)]
            sequence.token_ids.append(amount % 2)
            if manager.grow(sequence, len(sequence)):
                sequence.num_computed_tokens = len(sequence)
                manager.publish(sequence)
            else:
                sequence.token_ids.pop()
        in_use = {block for sequence in held for block in sequence.block_table}
        assert manager.num_used_blocks == len(in_use)
        assert manager.num_free_blocks + len(in_use) == 6
    for sequence in held:
        manager.free(sequence)
    assert manager.num_free_blocks == 6
