"""Owns the blocks of the KV cache: who holds which, which are free, which can be shared. Knows no tensors.

A block holds the keys and values of `block_size` consecutive tokens. A full block gets a hash of its tokens and of all
that precede them; a later sequence with the same beginning takes the block instead of computing it. Freed blocks keep
their hash until they are handed out again, least recently freed first.

         ┌────────── allocate ──────────┐
    free (hashed or blank, oldest first)   held (reference count ≥ 1)
         └──────────── free ────────────┘

Block 0 is the null block: nobody owns it and nobody writes it, so what attention pads with is zero.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable

from router_service.scheduling.sequence import Sequence

NULL_BLOCK = 0
_NO_MORE = 2**60  # more blocks than any sequence has


class BlockManager:
    """The free list, the reference counts and the prefix cache.

    Invariant: every block but the null block is either in the free list or has a reference count ≥ 1, never both.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        """`num_blocks` to hand out, numbered from 1 on: the null block is not among them."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NULL_BLOCK + 1, NULL_BLOCK + 1 + num_blocks))
        self._references = [0] * (NULL_BLOCK + 1 + num_blocks)
        self.held: Counter[str] = Counter()  # blocks by tenant, who alone can share them; a shared one counts once
        self._doubted: set[int] = set()  # held blocks that are never published
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, those that only the prefix cache keeps included."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return self.num_blocks - len(self._free)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The longest cached beginning of a sequence without blocks; nothing is held, and no order changed.

        At least one token is left to compute: its logits are needed. Of a prompt that is to be scored all are.
        """
        assert not sequence.block_table, "a prefix is looked for before any block is held"
        found: list[int] = []
        if not self.prefix_caching or not sequence.may_skip_prefix:
            return found
        for index in range((len(sequence) - 1) // self.block_size):
            block = self._block_of_hash.get(self._hash(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def num_missing(self, sequence: Sequence, prefix: Iterable[int]) -> int:
        """How many free blocks a sequence needs for all its tokens when it takes this prefix."""
        num_held = sum(self._references[block] > 0 for block in prefix)
        return -(-len(sequence) // self.block_size) - num_held

    def take_prefix(self, sequence: Sequence) -> int:
        """Give a sequence what `find_prefix` finds. Returns its length in tokens."""
        for block in self.find_prefix(sequence):
            self._hold(block, sequence)
        sequence.num_published_blocks = len(sequence.block_table)
        return len(sequence.block_table) * self.block_size

    def will_compute(self, sequence: Sequence) -> bytes | None:
        """Names the first full block that a running sequence has not computed yet, if it will publish it."""
        index = sequence.num_computed_tokens // self.block_size
        if not self.prefix_caching or index >= len(sequence) // self.block_size:
            return None
        return self._hash(sequence, index)

    def would_take(self, sequence: Sequence, prefix: list[int]) -> bytes | None:
        """Names the block that a sequence would take after this prefix, if somebody had computed it."""
        if not self.prefix_caching or not sequence.may_skip_prefix:
            return None
        if len(prefix) >= (len(sequence) - 1) // self.block_size:
            return None
        return self._hash(sequence, len(prefix))

    def num_private(self, sequence: Sequence) -> int:
        """How many blocks nobody else holds."""
        return sum(self._references[block] == 1 for block in sequence.block_table)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for its first `num_tokens` tokens. False, and no change, when too few are free."""
        missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = next(iter(self._free))
            self._forget(block)
            self._hold(block, sequence)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the full, computed blocks of a sequence available to others."""
        indices = range(sequence.num_published_blocks, sequence.num_computed_tokens // self.block_size)
        if not self.prefix_caching or not indices:
            return
        if self._doubted and not self._doubted.isdisjoint(sequence.block_table):
            sequence.num_published_blocks = _NO_MORE  # nor what was computed from them
            return
        for index in indices:
            block, block_hash = sequence.block_table[index], self._hash(sequence, index)
            if block != NULL_BLOCK and block not in self._hash_of_block and block_hash not in self._block_of_hash:
                self._hash_of_block[block] = block_hash
                self._block_of_hash[block_hash] = block
            sequence.num_published_blocks = index + 1

    def release(self, sequence: Sequence, position: int) -> None:
        """Take back the blocks whose tokens all come before a position; the null block stands in their place."""
        for index in range(sequence.num_released_blocks, min(position // self.block_size, len(sequence.block_table))):
            if sequence.block_table[index] in self._doubted:
                sequence.num_published_blocks = _NO_MORE
            self._let_go(sequence.block_table[index], sequence)
            sequence.block_table[index] = NULL_BLOCK
            sequence.num_released_blocks = index + 1

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back; the last ones are reused first, since the beginning is what others may share."""
        for index in range(len(sequence.block_table) - 1, sequence.num_released_blocks - 1, -1):
            self._let_go(sequence.block_table[index], sequence)
        del sequence.block_table[:]
        sequence.num_published_blocks = sequence.num_released_blocks = 0

    def doubt(self, blocks: Iterable[int]) -> None:
        """Have the prefix cache forget what these held blocks hold, and take it back from none of their holders."""
        for block in blocks:
            if block != NULL_BLOCK:
                self._forget(block)
                self._doubted.add(block)

    def check(self, holders: Collection[Sequence]) -> None:
        """Raises AssertionError unless every block is free or with `holders`, as often as it is counted."""
        held = Counter(block for sequence in holders for block in sequence.block_table if block != NULL_BLOCK)
        counted = {block: count for block, count in enumerate(self._references) if count}
        assert held == counted, "a block is held by nobody, or counted wrong"
        assert len(held) + len(self._free) == self.num_blocks, "a block is lost"
        assert not held.keys() & self._free.keys(), "a block is free and held"
        published = {block: block_hash for block_hash, block in self._block_of_hash.items()}
        assert published == self._hash_of_block, "the prefix cache disagrees with itself"
        assert not published.keys() & self._doubted, "a doubted block is in the prefix cache"
        of_tenants = {(sequence.tenant, block) for sequence in holders for block in sequence.block_table}
        assert self.held == Counter(tenant for tenant, block in of_tenants if block != NULL_BLOCK)

    def _hold(self, block: int, sequence: Sequence) -> None:
        """Append it to the sequence's blocks."""
        if self._references[block] == 0:
            del self._free[block]
            self.held[sequence.tenant] += 1
        self._references[block] += 1
        sequence.block_table.append(block)

    def _let_go(self, block: int, sequence: Sequence) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            self._doubted.discard(block)  # blank: it is written before it is read again
            self.held[sequence.tenant] -= 1
            if not self.held[sequence.tenant]:
                del self.held[sequence.tenant]

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of_block.pop(block, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Of one full block and all before it: a chain, each link of which is computed once per sequence."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            assert start + self.block_size <= len(sequence.token_ids), "a token that is not read yet has no hash"
            previous = hashes[-1] if hashes else _digest(sequence.tenant.encode())
            tokens = array("i", sequence.token_ids[start : start + self.block_size]).tobytes()
            hashes.append(_digest(previous + tokens))
        return hashes[index]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
