"""Checks of arguments at construction: quote the value, name the fix."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax


def is_concrete_number(number: Any) -> bool:
    """True for plain numbers, NumPy's included; False for arrays, which `optax.inject_hyperparams` supplies."""
    return isinstance(number, numbers.Real) and not isinstance(number, bool)


def check_number(name: str, number: Any, hint: str) -> None:
    """Raises ValueError unless `number` is finite (or traced)."""
    if isinstance(number, jax.Array):
        return
    if not is_concrete_number(number) or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {number!r}: {hint}.")


def check_fraction(name: str, number: Any, hint: str, below_one: bool = False) -> None:
    """Raises ValueError unless 0 <= number <= 1 (or < 1), or traced."""
    check_number(name, number, hint)
    if is_concrete_number(number) and not (0 <= number < 1 or (number == 1 and not below_one)):
        interval = "[0, 1)" if below_one else "[0, 1]"
        raise ValueError(f"{name} must lie in {interval}, got {number!r}: {hint}.")


def check_part(name: str, part: Any, method: str, example: str) -> None:
    """Raises TypeError unless `part` has a method."""
    if not hasattr(part, method):
        raise TypeError(f"{name} must be a part such as {example} makes, with a method {method}, got {part!r}.")


def check_positive_int(name: str, number: Any, hint: str) -> None:
    """Raises ValueError unless `number` is a whole number of at least 1."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}: {hint}.")
