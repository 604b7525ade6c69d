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
from collections.abc import Iterable

from router_service.sequence import Sequence

NULL_BLOCK = 0


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

    def take_prefix(self, sequence: Sequence) -> int:
        """Give a sequence without blocks the longest cached beginning. Returns its length in tokens.

        At least one token is left to compute: its logits are needed. Of a prompt that is to be scored all are.
        """
        assert not sequence.block_table, "a prefix is taken before any block is held"
        if not self.prefix_caching or not sequence.may_skip_prefix:
            return 0
        for block_hash in self._hashes(sequence, (len(sequence) - 1) // self.block_size):
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            self._hold(block)
            sequence.block_table.append(block)
        return len(sequence.block_table) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for its first `num_tokens` tokens. False, and no change, when too few are free."""
        missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            sequence.block_table.append(block)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the full, computed blocks of a sequence available to others."""
        if not self.prefix_caching:
            return
        num_full = sequence.num_computed_tokens // self.block_size
        for block, block_hash in zip(sequence.block_table, self._hashes(sequence, num_full), strict=False):
            if block in self._doubted:
                return  # nor what was computed from it
            if block not in self._hash_of_block and block_hash not in self._block_of_hash:
                self._hash_of_block[block] = block_hash
                self._block_of_hash[block_hash] = block

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back; the last ones are reused first, since the beginning is what others may share."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                self._doubted.discard(block)  # blank: it is written before it is read again
        sequence.block_table.clear()

    def doubt(self, blocks: Iterable[int]) -> None:
        """Have the prefix cache forget what these held blocks hold, and take it back from none of their holders."""
        for block in blocks:
            if block != NULL_BLOCK:
                self._forget(block)
                self._doubted.add(block)

    def check(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block is free or with `holders`, as often as it is counted."""
        held = Counter(block for sequence in holders for block in sequence.block_table if block != NULL_BLOCK)
        counted = {block: count for block, count in enumerate(self._references) if count}
        assert held == counted, "a block is held by nobody, or counted wrong"
        assert len(held) + len(self._free) == self.num_blocks, "a block is lost"
        assert not held.keys() & self._free.keys(), "a block is free and held"
        published = {block: block_hash for block_hash, block in self._block_of_hash.items()}
        assert published == self._hash_of_block, "the prefix cache disagrees with itself"
        assert not published.keys() & self._doubted, "a doubted block is in the prefix cache"

    def _hold(self, block: int) -> None:
        self._references[block] += 1
        self._free.pop(block, None)

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of_block.pop(block, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """The chain of hashes of the first `num_blocks` blocks; each is computed once per sequence."""
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            previous = hashes[-1] if hashes else _digest(sequence.request.cache_salt.encode())
            tokens = array("i", sequence.token_ids[start : start + self.block_size]).tobytes()
            hashes.append(_digest(previous + tokens))
        return hashes[:num_blocks]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
