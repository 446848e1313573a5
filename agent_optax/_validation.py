"""Checks of arguments at construction: quote the value, name the fix."""

from __future__ import annotations

import math
from typing import Any

import jax


def is_concrete_number(number: Any) -> bool:
    """True for plain numbers; False for traced or array values, which `optax.inject_hyperparams` supplies."""
    return isinstance(number, (int, float)) and not isinstance(number, (bool, jax.Array))


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


def check_positive_int(name: str, number: Any, hint: str) -> None:
    """Raises ValueError unless `number` is a whole number of at least 1."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}: {hint}.")
