"""The block cache: who holds which block of keys and values, and what can be used again.

A sequence's keys and values lie in blocks of `block_tokens` positions, which it lists in order. A block may be held by
several sequences (`_holders` counts them):

    shared prompts   a full block is found again by its *key*: a hash of the owner, the adapter, and all tokens up to
                     its end. So two sequences that begin alike hold the same blocks as far as they are alike
    samples          sequences that continue one prompt share all its blocks, also the last, half-filled one
    copy on write    who must write into a block that others hold too gets a copy of his own first

A block that nobody holds any more but whose content has a key stays where it is until the room is needed; the one that
was left longest ago goes first. The owner in the key keeps tenants apart: nobody can find out, by the time that an
answer takes, what somebody else's prompts are. Keys are 128-bit BLAKE2b: a prompt cannot be made to collide.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol


class Held(Protocol):
    """What the cache knows of a sequence."""

    tokens: list[int]
    cached: int  # tokens whose keys and values are in its blocks
    blocks: list[int]
    keys: list[bytes]  # of its full blocks, as far as they were computed
    published: int  # full blocks that can be found by others
    root: bytes  # what the first key is made of: see `root_key`


def root_key(owner: str, adapter: str | None) -> bytes:
    """Where a chain of keys begins. Different owners or adapters never share a block."""
    return hashlib.blake2b(repr((owner, adapter)).encode(), digest_size=16).digest()


class BlockCache:
    """`blocks` blocks of `block_tokens` positions each; `copy(source, target)` copies one."""

    def __init__(self, blocks: int, block_tokens: int, copy: Callable[[int, int], None]):
        self.blocks, self.block_tokens = blocks, block_tokens
        self._copy = copy
        self._holders = [0] * blocks
        self._empty: list[int] = []  # used before, nothing of worth in them
        self._untouched = 0  # blocks from here on were never written
        self._kept: OrderedDict[int, None] = OrderedDict()  # nobody holds them, but they have a key; oldest first
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that can be had, those that would be forgotten for it included."""
        return len(self._empty) + self.blocks - self._untouched + len(self._kept)

    @property
    def kept(self) -> int:
        """Blocks that nobody holds, kept in case their content is asked for again."""
        return len(self._kept)

    def needed(self, tokens: int) -> int:
        """How many blocks `tokens` positions take."""
        return -(-tokens // self.block_tokens)

    def adopt(self, sequence: Held) -> None:
        """Give a sequence that holds nothing the blocks with which others began alike.

        At least its last token is left for it to read: what follows is drawn from there.
        """
        most = (len(sequence.tokens) - 1) // self.block_tokens
        for index in range(most):
            block = self._by_key.get(self._key(sequence, index))
            if block is None:
                break
            self._hold(block)
            sequence.blocks.append(block)
        sequence.cached = len(sequence.blocks) * self.block_tokens

    def cover(self, sequence: Held, end: int) -> bool:
        """See to it that the positions from `sequence.cached` up to `end` can be written; False if there is no room."""
        first = sequence.cached // self.block_tokens
        if first < len(sequence.blocks) and self._holders[sequence.blocks[first]] > 1:
            own = self._take()
            if own is None:
                return False
            self._copy(sequence.blocks[first], own)
            self._leave(sequence.blocks[first])
            sequence.blocks[first] = own
        while len(sequence.blocks) < self.needed(end):
            block = self._take()
            if block is None:
                return False
            sequence.blocks.append(block)
        return True

    def share(self, source: Held, target: Held) -> None:
        """Let `target`, which holds nothing, have what `source` has of its tokens."""
        target.cached = min(source.cached, len(target.tokens))
        target.blocks = source.blocks[: self.needed(target.cached)]
        for block in target.blocks:
            self._hold(block)
        target.keys = source.keys[: target.cached // self.block_tokens]
        target.published = min(source.published, len(target.keys))

    def publish(self, sequence: Held) -> None:
        """Let the blocks that the sequence has filled be found by their content."""
        full = sequence.cached // self.block_tokens
        for index in range(sequence.published, full):
            key, block = self._key(sequence, index), sequence.blocks[index]
            if key not in self._by_key and block not in self._key_of:
                self._by_key[key], self._key_of[block] = block, key
        sequence.published = full

    def drop(self, sequence: Held) -> None:
        """The sequence holds nothing any more. Its last blocks are the first to be forgotten: beginnings are shared."""
        for block in reversed(sequence.blocks):
            self._leave(block)
        sequence.blocks, sequence.cached, sequence.published = [], 0, 0

    def forget(self) -> bool:
        """Forget all content that nobody holds; whether nothing at all is left."""
        for block in list(self._kept):
            self._unkey(block)
            self._empty.append(block)
        self._kept.clear()
        if self.free == self.blocks:
            self._empty, self._untouched = [], 0
        return self.free == self.blocks

    def _key(self, sequence: Held, index: int) -> bytes:
        """The key of the sequence's block `index`, made from the key before it and the block's tokens."""
        keys, size = sequence.keys, self.block_tokens
        while len(keys) <= index:
            at = len(keys) * size
            tokens = array("q", sequence.tokens[at : at + size]).tobytes()
            keys.append(hashlib.blake2b((keys[-1] if keys else sequence.root) + tokens, digest_size=16).digest())
        return keys[index]

    def _take(self) -> int | None:
        if self._empty:
            block = self._empty.pop()
        elif self._untouched < self.blocks:
            block = self._untouched
            self._untouched += 1
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._unkey(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._kept.pop(block, None)

    def _leave(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def _unkey(self, block: int) -> None:
        del self._by_key[self._key_of.pop(block)]
