"""The line that `init` logs on request: which leaves are pruned, and which are not."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import agent_optax

PARAMS = {
    **{f"block_{i}": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)} for i in range(3)},
    "head": {"kernel": jnp.ones((8, 4))},
    "positions": jnp.ones((6, 8)),
}
LINE = (
    "sparsify prunes 4 of 8 leaves, which hold 224 of 296 weights: block_*/kernel (3), head/kernel; "
    "not pruned: block_*/bias (3), positions"
)


def sparse(**options: Any) -> Any:
    return agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), **options)


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_one_line_names_the_leaves_taken_and_left(storage: str, caplog: pytest.LogCaptureFixture) -> None:
    tx = optax.chain(optax.clip(1.0), sparse(sparsity=0.75, storage=storage))
    with caplog.at_level(logging.INFO, logger="agent_optax"):
        tx.init(PARAMS)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("agent_optax", "INFO", LINE)
    ]


def test_given_masks_and_patterns_of_names(caplog: pytest.LogCaptureFixture) -> None:
    """The names in the line are what `named` takes."""
    where = agent_optax.named("block_*/kernel")
    masks = jax.tree.map(lambda chosen, p: p > 0 if chosen else None, where(PARAMS), PARAMS)
    with caplog.at_level(logging.INFO, logger="agent_optax"):
        sparse(sparsity=0.75, where=where).init(PARAMS)
        jax.jit(sparse(masks=masks).init)(PARAMS)  # when it is traced
    left = "block_*/bias (3), head/kernel, positions"
    line = f"sparsify prunes 3 of 8 leaves, which hold 192 of 296 weights: block_*/kernel (3); not pruned: {left}"
    assert [record.getMessage() for record in caplog.records] == [line, line]


def test_nothing_is_said_unasked(caplog: pytest.LogCaptureFixture) -> None:
    sparse(sparsity=0.75).init(PARAMS)
    assert caplog.records == []
