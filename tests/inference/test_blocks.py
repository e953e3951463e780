import random
from dataclasses import dataclass, field

import pytest

from puna.inference.blocks import BlockCache, root_key


@dataclass
class Held:
    tokens: list[int]
    root: bytes = root_key("", None)
    cached: int = 0
    published: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


class Memory(BlockCache):
    """A cache whose blocks hold tokens, to see who reads what."""

    def __init__(self, blocks: int):
        self.content: dict[int, list[int]] = {}
        super().__init__(blocks, 4, lambda a, b: self.content.__setitem__(b, list(self.content.get(a, []))))

    def read(self, held: Held, end: int) -> bool:
        """Write the tokens up to `end` as a runner would."""
        if not self.cover(held, end):
            return False
        for position in range(held.cached, end):
            block = self.content.setdefault(held.blocks[position // 4], [])
            del block[position % 4 :]
            block.append(held.tokens[position])
        held.cached = end
        return True

    def seen(self, held: Held) -> list[int]:
        return [t for b in held.blocks[: self.needed(held.cached)] for t in self.content[b]][: held.cached]


def test_what_is_shared_is_never_written_by_one_of_those_who_share_it():
    memory = Memory(10)
    first = Held([1, 2, 3, 4, 5, 6])
    memory.read(first, 6)
    second = Held(list(first.tokens))
    memory.share(first, second)
    assert second.blocks == first.blocks and memory.free == 8
    first.tokens.append(7)
    second.tokens.append(8)
    memory.read(first, 7)
    memory.read(second, 7)
    assert memory.seen(first) == [1, 2, 3, 4, 5, 6, 7] and memory.seen(second) == [1, 2, 3, 4, 5, 6, 8]
    assert first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]


def test_an_equal_beginning_is_found_but_never_the_last_token():
    memory = Memory(10)
    first = Held(list(range(12)))
    memory.read(first, 12)
    memory.publish(first)
    for length, found in ((12, 8), (13, 12), (9, 8), (8, 4), (4, 0)):
        other = Held([*range(12), 99][:length])
        memory.adopt(other)
        assert other.cached == found
        memory.drop(other)
    differs = Held([0, 1, 2, 3, 4, 77, 6, 7, 8])
    memory.adopt(differs)
    assert differs.cached == 4


@pytest.mark.parametrize(("owner", "adapter"), [("b", None), ("", None), ("a", "tone"), ("a', None)", None)])
def test_nothing_is_shared_between_owners_or_adapters(owner, adapter):
    memory = Memory(10)
    first = Held(list(range(9)), root_key("a", None))
    memory.read(first, 9)
    memory.publish(first)
    memory.drop(first)
    other = Held(list(range(9)), root_key(owner, adapter))
    memory.adopt(other)
    assert other.cached == 0
    again = Held(list(range(9)), root_key("a", None))
    memory.adopt(again)
    assert again.cached == 8


def test_what_was_left_longest_ago_is_forgotten_first_and_ends_before_beginnings():
    memory = Memory(4)
    old, new = Held(list(range(8))), Held(list(range(50, 58)))
    for held in (old, new):
        memory.read(held, 8)
        memory.publish(held)
        memory.drop(held)
    assert memory.kept == memory.free == 4
    third = Held(list(range(90, 94)))
    memory.read(third, 4)
    found = [Held([*range(8), 0]), Held([*range(50, 58), 0])]
    for held in found:
        memory.adopt(held)
    assert [held.cached for held in found] == [4, 8]


def test_without_room_nothing_is_taken_from_others():
    memory = Memory(2)
    first = Held(list(range(8)))
    assert memory.read(first, 8)
    assert not memory.read(Held([1]), 1)
    assert memory.seen(first) == list(range(8))


@pytest.mark.parametrize("seed", range(8))
def test_in_any_history_each_reads_what_it_wrote_and_at_the_end_all_is_free(seed):
    rng = random.Random(seed)
    memory = Memory(12)
    alive: list[Held] = []
    for _ in range(600):
        kind = rng.random()
        if kind < 0.3 and len(alive) < 6:
            held = Held([rng.randrange(2) for _ in range(rng.randrange(1, 20))])
            memory.adopt(held)
            alive.append(held)
        elif kind < 0.75 and alive:
            held = rng.choice(alive)
            if held.cached == len(held.tokens):
                held.tokens.append(rng.randrange(2))
            memory.read(held, rng.randrange(held.cached + 1, len(held.tokens) + 1))
            memory.publish(held)
        elif kind < 0.85 and alive:
            source = rng.choice(alive)
            copy = Held(source.tokens[: source.cached])
            memory.share(source, copy)
            alive.append(copy)
        elif alive:
            memory.drop(alive.pop(rng.randrange(len(alive))))
        for held in alive:
            assert memory.seen(held) == held.tokens[: held.cached]
    for held in alive:
        memory.drop(held)
    assert memory.free == 12 and memory.forget()
