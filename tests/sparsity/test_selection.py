"""top_k_mask against a stable sort."""

from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from agent_optax import top_k_mask

FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
INTEGERS = {name: np.dtype(name) for name in ("int8", "int32", "uint8", "uint32")}
SHAPES = [(), (1,), (7,), (4, 5), (2, 3, 4)]  # few: each compiles


def by_stable_sort(scores: np.ndarray, k: int) -> np.ndarray:
    """Descending, nan last, equal scores in the order of their flat index."""
    flat = scores.reshape(-1)
    if flat.dtype.kind not in "iu":
        flat = flat.astype(np.float64)
        flat = np.where(np.isnan(flat), -np.inf, np.clip(flat, -1e300, 1e300))  # nan below -inf
    order = sorted(range(flat.size), key=lambda i: (-flat[i].item(), i))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


select = jax.jit(top_k_mask)


@st.composite
def scores_and_k(draw: Any, dtype: Any) -> tuple[np.ndarray, int]:
    shape = draw(st.sampled_from(SHAPES))
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        values = st.sampled_from([bounds.min, bounds.min + 1, 0, 1, bounds.max - 1, bounds.max])
        values = values | st.integers(int(bounds.min), int(bounds.max))
    else:
        special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, float(ml_dtypes.finfo(dtype).max)]
        values = st.sampled_from(special) | st.floats(-60000, 60000, width=16) | st.floats(-1e-7, 1e-7)
    size = int(np.prod(shape))
    with np.errstate(over="ignore"):
        scores = np.asarray(draw(st.lists(values, min_size=size, max_size=size))).astype(dtype).reshape(shape)
    return scores, draw(st.integers(0, size))


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_equals_a_stable_sort(name: str, data: Any) -> None:
    scores, k = data.draw(scores_and_k(np.dtype({**FLOATS, **INTEGERS}[name])))
    mask = select(jnp.asarray(scores), k)
    np.testing.assert_array_equal(mask, by_stable_sort(scores, k))
    assert mask.dtype == bool and mask.sum() == k


def test_equals_a_stable_sort_in_double_precision(x64: None) -> None:
    scores = np.asarray([1.0, 1.0 + 1e-15, 1.0 + 1e-12, -1.0, np.inf, -np.inf, np.nan, 1e-300, -1e-300])
    for k in range(scores.size + 1):
        np.testing.assert_array_equal(select(jnp.asarray(scores), k), by_stable_sort(scores, k))


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("fill", [0.0, -3.0, np.nan, np.inf, -np.inf])
def test_equal_scores_go_to_the_lowest_index(shape: tuple[int, ...], fill: float) -> None:
    size = int(np.prod(shape))
    for k in {0, 1, size // 2, size}:
        expected = (np.arange(size) < k).reshape(shape)
        np.testing.assert_array_equal(select(jnp.full(shape, fill), k), expected)


def test_order_of_special_values() -> None:
    order = jnp.asarray([jnp.inf, 3e38, 1.0, 1e-30, 0.0, -1e-30, -1.0, -3e38, -jnp.inf, jnp.nan])
    for k in range(order.size + 1):
        np.testing.assert_array_equal(select(order, k), np.arange(order.size) < k)
        np.testing.assert_array_equal(select(order[::-1], k), np.arange(order.size)[::-1] < k)
    zeros = jnp.asarray([-0.0, 0.0, -0.0])
    np.testing.assert_array_equal(select(zeros, 1), [True, False, False])


def test_a_large_array_with_many_ties() -> None:
    scores = np.random.default_rng(0).integers(0, 50, (300, 401)).astype(np.float32)
    for k in (1, 777, 60_000, scores.size - 1):
        np.testing.assert_array_equal(select(jnp.asarray(scores), k), by_stable_sort(scores, k))


def test_k_may_be_traced_and_mapped_over() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (3, 2, 5)).astype(np.float32)
    ks = np.asarray([0, 7, 10])
    masks = jax.jit(jax.vmap(top_k_mask))(jnp.asarray(scores), jnp.asarray(ks))
    for mask, row, k in zip(masks, scores, ks, strict=True):
        np.testing.assert_array_equal(mask, by_stable_sort(row, int(k)))


def primitives(jaxpr: Any) -> set[str]:
    """The primitives of a jaxpr and of all jaxprs in it."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                names |= primitives(inner.jaxpr)
    return names


def test_uses_reductions_and_nothing_that_moves_data() -> None:
    used = primitives(jax.make_jaxpr(top_k_mask)(jnp.ones((4, 5)), jnp.asarray(3)).jaxpr)
    assert "reduce_sum" in used  # the loops were looked into
    moving = ("sort", "top_k", "gather", "scatter", "cumsum", "argmax", "argmin", "dynamic_slice", "transpose")
    assert {name for name in used if name.startswith(moving)} == set()


@pytest.mark.parametrize("k", [-1, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie between 0 and the number of scores, 4, got {k}\."):
        top_k_mask(jnp.ones((2, 2)), k)
