"""The calculator against exact arithmetic and against Python itself."""

import contextlib
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.tools.calculator import MAX_CHARS, calculate, calculator, evaluate, format_number
from puna.tools.definition import ToolError
from puna.tools.sandbox import Sandbox, SandboxConfig


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("395", "395"),
        ("007", "7"),
        ("12 * (3.5 - 1/4)", "39"),
        ("0.1 + 0.2", "0.3"),
        ("5/2", "2.5"),
        ("10/4", "2.5"),
        ("6/3", "2"),
        ("1/3", "0.3333333333"),
        ("2/3", "0.6666666667"),
        ("-2/3", "-0.6666666667"),
        ("1/3000", "0.0003333333333"),
        ("2/3*10**12", "666666666666.6666666667"),
        ("0.00000000005", "0.00000000005"),
        ("1/3 - 1/3", "0"),
        ("-0", "0"),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("2**-2", "0.25"),
        ("0**0", "1"),
        ("(-1)**99999999999999999999", "-1"),
        ("-7//2", "-4"),
        ("-7 % 3", "2"),
        ("7 % -3", "-2"),
        ("7.5 % 2", "1.5"),
        ("2 - -3", "5"),
        ("--3", "3"),
        (".5 + 1.", "1.5"),
        ("3 × 4 ^ 2 ÷ 6 − 1", "7"),
        ("\n1\t+\r1 ", "2"),
        ("2**100", "1267650600228229401496703205376"),
    ],
)
def test_a_result_is_exact_and_written_in_one_way(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("", "the expression ends too early"),
        ("1 +", "the expression ends too early"),
        ("(1 + 2", "a ')' is missing"),
        ("1 + 2)", "an operator was expected, not ')'"),
        ("1 2", "an operator was expected, not '2'"),
        ("* 2", "a number was expected, not '*'"),
        ("2 * x", "'x' is not part of arithmetic"),
        ("1,000", "',' is not part of arithmetic"),
        ("٣", "'٣' is not part of arithmetic"),
        ("__import__('os')", "'_' is not part of arithmetic"),
        ("1 < 2", "'<' is not part of arithmetic"),
        ("1/0", "division by zero"),
        ("1//0", "division by zero"),
        ("1%(2-2)", "division by zero"),
        ("0**-1", "division by zero"),
        ("2**0.5", "an exponent must be a whole number"),
        ("9**9**9", "a number has more than 1024 bits"),
        ("0.1**400", "a number has more than 1024 bits"),
        ("1" * 400, "a number has more than 1024 bits"),
        ("(" * 51 + "1" + ")" * 51, "the expression is nested more than 50 deep"),
        ("-" * 900 + "1", "the expression is nested more than 50 deep"),
        ("1+" * 1000 + "1", "the expression has 2,001 characters, at most 1,000 are accepted"),
    ],
)
def test_what_cannot_be_calculated_is_said(expression, error):
    assert calculator().call({"query": expression}) == f"error: {error}"


NUMBERS = st.fractions(min_value=-50, max_value=50, max_denominator=8)
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
}


@st.composite
def expressions(draw, depth=3):
    """An expression in which everything is in parentheses, with its value; None where it has none."""
    if depth == 0 or draw(st.booleans()):
        value = draw(st.fractions(min_value=0, max_value=50, max_denominator=8))
        return (f"({value.numerator}/{value.denominator})" if value.denominator > 1 else str(value)), value
    (left, a), (right, b) = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    operator = draw(st.sampled_from(list(OPERATIONS)))
    dead = a is None or b is None or (operator in ("/", "//", "%") and b == 0)
    return f"({left} {operator} {right})", None if dead else OPERATIONS[operator](a, b)


@settings(max_examples=60)
@given(expressions())
def test_the_value_is_that_of_exact_fractions(drawn):
    text, value = drawn
    if value is None:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value


def random_expression(draw, depth=2):
    """Numbers, operators, signs and parentheses as Python's grammar has them."""
    parts = []
    for _ in range(draw.randint(1, 4)):
        sign = draw.choice(["", "", "", "-", "+", "- -"])
        atom = f"({random_expression(draw, depth - 1)})" if depth and draw.random() < 0.3 else str(draw.randint(0, 4))
        parts += [sign + atom, draw.choice(["+", "-", "*", "/", "//", "%", "**"])]
    return " ".join(parts[:-1])


def test_precedence_is_pythons():
    """Every expression that Python computes in exact fractions has the same value here; its errors are errors here."""
    draw = random.Random(0)
    texts = [random_expression(draw) for _ in range(400)]
    program = f"""
import re
from fractions import Fraction
for text in {texts!r}:
    try:
        value = eval(re.sub(r"[0-9]+", lambda m: f"Fraction({{m[0]}})", text))
        print(value if isinstance(value, (int, Fraction)) else "inexact")
    except (ZeroDivisionError, OverflowError):
        print("error")
"""
    with Sandbox(SandboxConfig(source_chars=100_000, output_chars=1_000_000, cpu_s=10, wall_s=60)) as sandbox:
        run = sandbox.run(program)
    assert not run.error
    assert run.stdout.count("inexact") < 40
    for text, expected in zip(texts, run.stdout.splitlines(), strict=True):
        if expected == "inexact":  # Python's own: an exponent that is not whole, or int ** -int
            continue
        if expected == "error":
            with pytest.raises(ToolError):
                evaluate(text)
        else:
            assert evaluate(text) == Fraction(expected), text


@given(NUMBERS, st.integers(min_value=0, max_value=10))
def test_a_decimal_is_read_back_as_written(number, places):
    written = f"{float(number):.{places}f}"
    assert Fraction(calculate(written)) == Fraction(written)


@given(st.fractions())
def test_a_written_result_is_within_half_of_its_last_digit(value):
    text = format_number(value)
    assert "e" not in text.lower()
    digits = len(text.partition(".")[2])
    if value.denominator == 1:
        assert text == str(value.numerator)
    else:
        assert abs(Fraction(text) - value) <= Fraction(1, 2 * 10 ** max(digits, 10))


@given(st.text(alphabet="0123456789+-*/%(). ^", max_size=200))
def test_nothing_but_a_tool_error_is_raised_and_nothing_takes_long(text):
    started = time.process_time()
    with contextlib.suppress(ToolError):
        evaluate(text)
    assert time.process_time() - started < 0.5


def test_the_costliest_expressions_are_quick():
    started = time.process_time()
    for text in ("9" * 300 + "*" + "9" * 300, "*".join(["1.37"] * 200), "+".join(f"1/{n}" for n in range(100, 250))):
        calculator().call({"query": text[:MAX_CHARS]})
    assert time.process_time() - started < 1.0
