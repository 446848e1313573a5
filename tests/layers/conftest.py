"""Products in full precision, for comparisons with dense ones: an accelerator rounds them to fewer bits by default."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """For each test of this folder."""
    with jax.default_matmul_precision("highest"):
        yield
