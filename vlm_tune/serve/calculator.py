"""Compute what a model wrote: numbers, operators and a few functions, bounded in size and time, without eval."""

import ast
import math
import operator
import warnings
from collections.abc import Callable

from vlm_tune.errors import DataError

LONGEST = 200  # characters; what is nested deeper than they allow cannot be written
MOST_BITS = 4096  # of any whole number on the way: about 1,200 digits
Number = int | float
OPERATORS: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    **{"sqrt": math.sqrt, "exp": math.exp, "log": math.log, "log10": math.log10, "abs": abs, "round": round},
    **{"sin": math.sin, "cos": math.cos, "tan": math.tan, "floor": math.floor, "ceil": math.ceil},
}
CONSTANTS = {"pi": math.pi, "e": math.e}
SPELLINGS = str.maketrans({"×": "*", "÷": "/", "−": "-", "（": "(", "）": ")", "^": "**", ",": None, "，": None})


def calculate(text: str) -> str:
    """Return the value of an expression such as `2 * (3 + sqrt(16))`, as text.

    `^` is a power, and commas group digits. Raise DataError for what is no expression, and for one whose value, or any
    number on the way, is not real or too large.
    """
    if len(text) > LONGEST:
        raise DataError(f"{len(text)} characters: at most {LONGEST}")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's own about text such as `1if`
            tree = ast.parse(text.translate(SPELLINGS).strip(), mode="eval")
        value = _bounded(_value(tree.body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise DataError(f"cannot be computed: {error}") from error
    return str(value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](_value(argument)))
    raise ValueError("write numbers, + - * / // % **, parentheses, pi, e and " + ", ".join(FUNCTIONS))


def _power(base: Number, exponent: Number) -> Number:
    """Raise to a power; a whole number that would become too large is refused before it is computed."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MOST_BITS:
        raise ValueError("the number becomes too large")
    return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError("no real number")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError("the number becomes too large")
    return value
