"""Exact arithmetic on what a model wrote: `12 * (3.5 - 1/4)` is `39`.

Every number is a fraction, so nothing is rounded before the end: `0.1 + 0.2` is `0.3`. The grammar, tightest last:

    sum      product (("+" | "-") product)*
    product  sign (("*" | "/" | "//" | "%") sign)*
    sign     ("+" | "-") sign | power
    power    atom ("**" sign)?
    atom     number | "(" sum ")"

It is Python's precedence: `-2**2` is -4, `2**3**2` is 512, `//` rounds down and `%` has the divisor's sign. `×`, `÷`, `−`
and `^` are read as `*`, `/`, `-` and `**`.

A result is written in one way only: a whole number in full; any other number with at most `DIGITS` digits after the
point, not counting the zeros that a small number begins with, rounded half to even, without zeros at the end and
without an exponent: 5/2 is `2.5`, 1/3 is `0.3333333333`, 1/3000 is `0.0003333333333`.
No expression takes long: its length, its nesting and the size of every intermediate number are bounded.
"""

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from typing import Any

from puna.tools.definition import Tool, ToolError

DIGITS = 10  # of a result that is not whole, after the point
MAX_CHARS = 1000
MAX_DEPTH = 50  # parentheses, signs and powers inside one another
MAX_BITS = 1024  # of a numerator or denominator: 308 digits

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(\*\*|//|[-+*/%()]))", re.ASCII)
_SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**"})


def evaluate(expression: str) -> Fraction:
    """The exact value. Raises `ToolError` with the reason if it is not an expression, has no value, or is too large."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression):,} characters, at most {MAX_CHARS:,} are accepted")
    return _Parser(expression.translate(_SPELLINGS)).parse()


def format_number(value: Fraction) -> str:
    """The one way in which a number is written."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = len(str(abs(value.numerator) // value.denominator)) if abs(value) >= 1 else 0
    context = Context(prec=whole + DIGITS, rounding=ROUND_HALF_EVEN, Emin=-10_000, Emax=10_000)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    text = f"{quotient:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def calculate(expression: str) -> str:
    """`evaluate` and `format_number`."""
    return format_number(evaluate(expression))


def calculator() -> Tool:
    """Llama's built-in `wolfram_alpha`, with arithmetic alone behind it."""

    def function(arguments: dict[str, Any]) -> str:
        return calculate(arguments["query"])

    return Tool(
        name="wolfram_alpha",
        description="Calculates an arithmetic expression exactly.",
        parameters={
            "type": "object",
            "properties": {"query": {"type": "string", "description": "the expression, for example 12 * (3.5 - 1/4)"}},
            "required": ["query"],
        },
        function=function,
    )


class _Parser:
    """Reads an expression from left to right and computes as it reads; one method per rule of the grammar."""

    def __init__(self, expression: str):
        self.tokens = _tokens(expression)
        self.position = 0
        self.depth = 0

    def parse(self) -> Fraction:
        value = self.sum()
        if self.next != "":
            raise ToolError(f"an operator was expected, not {self.next!r}")
        return value

    @property
    def next(self) -> str:
        """The token to be read, "" after the last one."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.position += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.next in ("+", "-"):
            value = _bounded(value + self.product() if self.take() == "+" else value - self.product())
        return value

    def product(self) -> Fraction:
        value = self.sign()
        while self.next in ("*", "/", "//", "%"):
            operator, right = self.take(), self.sign()
            if operator != "*" and right == 0:
                raise ToolError("division by zero")
            value = _bounded(_PRODUCTS[operator](value, right))
        return value

    def sign(self) -> Fraction:
        self.enter()
        if self.next in ("+", "-"):
            value = -self.sign() if self.take() == "-" else self.sign()
        else:
            value = self.power()
        self.depth -= 1
        return value

    def power(self) -> Fraction:
        base = self.atom()
        if self.next != "**":
            return base
        self.take()
        return _power(base, self.sign())

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.take() != ")":
                raise ToolError("a ')' is missing")
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise ToolError(f"a number was expected, not {token!r}" if token else "the expression ends too early")
        return _bounded(Fraction(token))

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError(f"the expression is nested more than {MAX_DEPTH} deep")


_PRODUCTS = {
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
}


def _tokens(expression: str) -> list[str]:
    tokens, position = [], 0
    expression = expression.rstrip()
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ToolError(f"{expression[position:].lstrip()[0]!r} is not part of arithmetic")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent must be a whole number")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero")
    if _bits(base) > 1 and abs(exponent) * (_bits(base) - 1) > MAX_BITS:  # base**n has more than n * (bits - 1) bits
        raise ToolError(_TOO_LARGE)
    if abs(base) in (0, 1):  # then any exponent is harmless, but not to a loop over its bits
        return base ** (2 - int(exponent) % 2) if exponent else Fraction(1)
    return _bounded(base ** int(exponent))


_TOO_LARGE = f"a number has more than {MAX_BITS} bits"


def _bits(value: Fraction) -> int:
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ToolError(_TOO_LARGE)
    return value
