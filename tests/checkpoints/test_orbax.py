"""Everything a run needs is in the state: saved with orbax and restored, it goes on bit for bit."""

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conformance import CASES, NUM_STEPS, TYPICAL_CASES, initial_params, jit

# Every memory, with whole arrays and with active entries only; what they are wrapped in does not change what is saved.
NAMES = [
    "correct_gradients-cached_snapshot-loss_regression",
    "correct_gradients-table-gradient_regression",
    "correct_gradients-exact_difference-constant",
    "correct_gradients-history",
    "sparsify-rigl-agent",
    "sparsify-rigl-saga",
    "sparsify-compact-rigl-agent",
    "sparsify-compact-rigl-saga",
    "sparsify-compact-rigl-storm",
    "sparsify-compact-rigl-mars",
]

# What orbax leaves behind when it refuses to restore complains when it is collected: here, not in another test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def like(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def saved_and_restored(directory: Path, tree: Any, target: Any = None) -> Any:
    with ocp.CheckpointManager(directory) as manager:
        manager.save(NUM_STEPS, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    with ocp.CheckpointManager(directory) as manager:  # as another process would
        assert manager.latest_step() == NUM_STEPS
        return manager.restore(NUM_STEPS, args=ocp.args.StandardRestore(like(tree) if target is None else target))


def some_state(name: str, **changes: Any) -> Any:
    """A state of that structure, without compiling anything."""
    rng = np.random.default_rng(0)
    structure = jax.eval_shape(CASES[name].make(**changes).init, initial_params())
    return jax.tree.map(lambda x: jnp.asarray(rng.integers(0, 2, x.shape), x.dtype), structure)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tx = case.make()
    run = jit(functools.partial(case.run, tx))
    start = jit(lambda params: case.start(tx, params))(initial_params())
    half_way = run(*start)
    uninterrupted = run(*half_way)
    restored = saved_and_restored(tmp_path, half_way)
    chex.assert_trees_all_equal(restored, half_way)
    resumed = run(*restored)
    chex.assert_trees_all_equal(resumed, uninterrupted)
    assert not np.array_equal(resumed[0]["dense"]["kernel"], half_way[0]["dense"]["kernel"])  # it did go on


def test_every_typical_state_is_written_and_read(tmp_path: Path) -> None:
    """In one checkpoint: what orbax can write of one state it can of the others."""
    states = {name: some_state(name) for name in TYPICAL_CASES}
    chex.assert_trees_all_equal(saved_and_restored(tmp_path, states), states)


def test_bfloat16_survives(tmp_path: Path) -> None:
    structure = jax.eval_shape(CASES["sparsify-compact-rigl-agent"].make().init, initial_params(jnp.bfloat16))
    opt_state = jax.tree.map(lambda x: jnp.full(x.shape, 1, x.dtype), structure)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(opt_state))
    restored = saved_and_restored(tmp_path, opt_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, opt_state)
    chex.assert_trees_all_equal(restored, opt_state)


# States of another structure.


def test_a_state_with_a_missing_field_is_an_error_that_names_it(tmp_path: Path) -> None:
    opt_state = some_state("sparsify-rigl-agent")
    earlier = opt_state._asdict()
    del earlier["num_skipped_updates"]  # as an earlier version might have written it
    with pytest.raises(ValueError, match="num_skipped_updates"):
        saved_and_restored(tmp_path, earlier, target=like(opt_state))


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ("sparsify-rigl-agent", "sparsify-compact-rigl-agent"),  # another storage
        ("sparsify-rigl-saga", "sparsify-rigl-agent"),  # another memory
        ("agent", "sparsify-rigl-agent"),  # not sparse
    ],
)
def test_a_state_of_another_optimizer_is_an_error(saved: str, wanted: str, tmp_path: Path) -> None:
    state, target = some_state(saved), some_state(wanted)
    with pytest.raises(ValueError, match=r"structure|mismatch|do not match|shape"):
        saved_and_restored(tmp_path, state, target=like(target))


def test_other_counts_of_active_weights_are_an_error(tmp_path: Path) -> None:
    sparse, sparser = (some_state("sparsify-compact-rigl-momentum", sparsity=s) for s in (0.5, 0.75))
    with pytest.raises(ValueError, match=r"shape.*\((1, )?(24|12),?\)"):
        saved_and_restored(tmp_path, sparse, target=like(sparser))


def test_a_field_that_an_earlier_version_lacked_can_keep_its_start_value(tmp_path: Path) -> None:
    """A NamedTuple is written as a dictionary is: restore the fields that there are."""
    opt_state, fresh = some_state("sparsify-rigl-agent"), some_state("sparsify-rigl-agent")
    fresh = jax.tree.map(lambda x: x + 1 if x.dtype != bool else ~x, fresh)
    earlier, target = opt_state._asdict(), fresh._asdict()
    del earlier["num_skipped_updates"], target["num_skipped_updates"]
    mended = fresh._replace(**saved_and_restored(tmp_path, earlier, target=like(target)))
    chex.assert_trees_all_equal(mended, opt_state._replace(num_skipped_updates=fresh.num_skipped_updates))
    assert isinstance(optax.tree_utils.tree_get(mended, "snapshot"), dict)
