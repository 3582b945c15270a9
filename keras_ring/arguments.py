"""Checks of arguments that are no tensors, and the errors that refuse them.

Every check gives back the plain Python value, so that NumPy's numbers and
bools are as good as Python's own wherever they are kept or saved.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np


def integer(
    name: str, value: Any, least: int | None = 1, other: str = ""
) -> int:
    """A whole number.

    Args:
        name: of the argument.
        value: what was given; Python's and NumPy's integers are fine, bools
            are none.
        least: the smallest that is allowed; None for no bound.
        other: what else the argument may be, such as ", or None".

    Returns:
        The number as an `int`.

    Raises:
        ValueError: for anything else.
    """
    plain = _scalar(value)
    whole = isinstance(plain, numbers.Integral) and not isinstance(plain, bool)
    if whole and (least is None or int(plain) >= least):
        return int(plain)
    rule, fix = f"an integer of at least {least}", f"{least} or more"
    if least is None:
        rule, fix = "an integer", "a whole number such as 1"
    elif least == 1:
        rule = "a positive integer"
    raise _refusal(name, value, f"{rule}{other}", f"Pass {fix}.")


def finite(name: str, value: Any, other: str = "") -> float:
    """A number that is neither infinite nor NaN; see `integer`."""
    return _number(
        *(name, value, lambda number: True),
        *(f"a finite number{other}", "Pass one such as 1.0."),
    )


def positive(name: str, value: Any, other: str = "") -> float:
    """A finite number above 0; see `integer`."""
    return _number(
        *(name, value, lambda number: number > 0),
        *(f"a positive number{other}", "Pass a finite one above 0."),
    )


def not_negative(name: str, value: Any) -> float:
    """A finite number of at least 0; see `integer`."""
    return _number(
        *(name, value, lambda number: number >= 0),
        *("a finite number of at least 0", "Pass 0.0 for none."),
    )


def rate(name: str, value: Any) -> float:
    """A probability below 1; see `integer`."""
    return _number(
        *(name, value, lambda number: 0 <= number < 1),
        *("a rate from 0 to less than 1", "Pass 0.0 for none."),
    )


def flag(name: str, value: Any) -> bool:
    """True or False, or the 1 or 0 that Keras takes for them.

    Raises:
        ValueError: for anything else: "no" would count as true.
    """
    plain = _scalar(value)
    if isinstance(plain, numbers.Integral) and plain in (0, 1):
        return bool(plain)
    raise _refusal(name, value, "True or False", "Pass one of the two.")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of some names.

    Raises:
        ValueError: for another one.
    """
    if isinstance(value, str) and value in allowed:
        return str(value)
    rule = f"one of {', '.join(map(repr, allowed))}"
    raise _refusal(name, value, rule, "Pass one of these.")


def seed(name: str, value: Any) -> int | None:
    """The seed of a generator of random numbers, or None.

    Raises:
        ValueError: for what is no whole number of 32 bits.
    """
    if value is None:
        return None
    number = integer(name, value, least=0, other=" below 2**32, or None")
    if number < 2**32:
        return number
    rule = "an integer below 2**32, or None"
    raise _refusal(name, value, rule, "Pass a smaller one.")


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called.

    Raises:
        ValueError: for anything else.
    """
    if callable(value):
        return value
    fix = "Pass the function itself, not what it returns."
    raise _refusal(name, value, "a function", fix)


def shown(value: Any) -> str:
    """A value as an error shows it: an array or a tensor by its shape and
    dtype, anything else on one short line."""
    shape = getattr(value, "shape", ())
    if hasattr(value, "dtype") and shape is not None and len(shape) > 0:
        kind = type(value).__name__
        return f"<{kind} of shape {tuple(shape)}, dtype {value.dtype}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _number(
    name: str,
    value: Any,
    allowed: Callable[[float], bool],
    rule: str,
    fix: str,
) -> float:
    plain = _scalar(value)
    if isinstance(plain, numbers.Real) and not isinstance(plain, bool):
        number = float(plain)
        if math.isfinite(number) and allowed(number):
            return number
    raise _refusal(name, value, rule, fix)


def _refusal(name: str, value: Any, rule: str, fix: str) -> ValueError:
    return ValueError(
        f"The argument `{name}` must be {rule}. Received: "
        f"{name}={shown(value)}. {fix}"
    )


def _scalar(value: Any) -> Any:
    """NumPy's bools as Python's, and what an array without axes holds."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return bool(value) if isinstance(value, np.bool_) else value
