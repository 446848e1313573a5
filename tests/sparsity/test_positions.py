"""Positions of set bits against numpy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from agent_optax.sparsity.storages._positions import num_positions, places, positions


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    bits=st.lists(st.booleans(), max_size=70).flatmap(lambda bits: st.tuples(st.just(bits), st.permutations(bits))),
    padding=st.integers(0, 3),
)
def test_positions_and_places(bits: tuple[list[bool], list[bool]], padding: int) -> None:
    old, new = (np.array(b, bool) for b in bits)
    capacity = int(old.sum()) + padding
    held = [positions(jnp.packbits(jnp.asarray(mask)), capacity) for mask in (old, new)]
    for mask, indices in zip((old, new), held, strict=True):
        assert indices.shape == (capacity,) and indices.dtype == jnp.int32
        np.testing.assert_array_equal(indices[: mask.sum()], np.flatnonzero(mask))
        assert int(num_positions(indices)) == mask.sum()
        assert (np.diff(np.asarray(indices)) > 0).all()  # sorted and distinct, padding too
        assert (np.asarray(indices[mask.sum() :]) >= mask.size).all()
    place, is_set = places(jnp.packbits(jnp.asarray(old)), held[1])
    survivors = np.flatnonzero(new)
    np.testing.assert_array_equal(is_set, [*old[survivors], *(False,) * padding])
    np.testing.assert_array_equal(held[0][place][is_set], survivors[old[survivors]])


def test_rows_of_different_lengths() -> None:
    masks = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 1], [0] * 9, [0, 0, 0, 0, 1, 0, 0, 0, 0]], bool)
    rows = jax.vmap(lambda mask: positions(jnp.packbits(mask), 4))(jnp.asarray(masks))
    assert rows[0].tolist() == [0, 1, 2, 8]
    assert rows[2, 0] == 4
    assert int(num_positions(rows)) == 5
