"""The numbers that questions are about, divided so that evaluation meets new ones.

A number belongs to a part by its residue modulo 7, which has nothing to do with its digits: 3 is for evaluation, 5 for
choosing, the other five residues are for training. So every operand of an evaluation question, not only every pair, is
one that no training question contained. Results are whatever they are: a training answer may be a number that an
evaluation asks about.
"""

from random import Random

from puna.posttrain.world import Part

MODULUS = 7
RESIDUES: dict[Part, frozenset[int]] = {
    "train": frozenset({0, 1, 2, 4, 6}),
    "dev": frozenset({5}),
    "eval": frozenset({3}),
}


def operand(rng: Random, part: Part, digits: int) -> int:
    """A number of exactly `digits` digits that belongs to `part`."""
    while True:
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if number % MODULUS in RESIDUES[part]:
            return number


def part_of(number: int) -> Part:
    """The part that a number belongs to."""
    return next(part for part, residues in RESIDUES.items() if number % MODULUS in residues)
