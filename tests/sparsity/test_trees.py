"""Parameters are whatever tree Optax takes: pairs, tuples with names, None, nodes that can be called, mixed dtypes."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sparse_loop import train

import agent_optax

NUM_STEPS = 5  # the latest topology update is over: no weight has just grown, and is zero still
both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A model whose class can be called, as Equinox modules can be."""

    kernel: Any
    bias: Any

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


def kernel(seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (6, 5), dtype)


TREES: dict[str, Any] = {
    "pairs": [(kernel(0), jnp.ones(5)), (kernel(1), jnp.ones(5))],
    "one pair": (kernel(0), jnp.ones(5)),
    "one array": kernel(0),
    "tuples with names": [Layer(kernel(0), jnp.ones(5)), Layer(kernel(1), jnp.ones(5))],
    "fast and slow": optax.LookaheadParams([kernel(0), jnp.ones(5)], [kernel(1), jnp.ones(5)]),
    "a node that can be called": Linear(kernel(0), jnp.ones(5)),
    "None": {"a": {"kernel": kernel(0), "bias": None}, "b": None, "c": jnp.ones(5)},
    "dtypes": {"a": kernel(0, jnp.bfloat16), "b": kernel(1, jnp.float16), "c": kernel(2), "d": jnp.ones(5)},
    "no entries": {"a": kernel(0), "b": jnp.ones((0, 5)), "c": jnp.ones(5)},
}


def run(tx: Any, params: Any) -> Any:
    """The parameters after some steps; the gradient is not zero where a parameter is."""
    return train(tx, params, lambda params, step: jax.tree.map(jnp.cos, params), NUM_STEPS)[0]


@both_storages
@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_any_kind_is_trained_as_a_list_of_its_leaves(name: str, storage: str) -> None:
    tree, rng = TREES[name], np.random.default_rng(0)
    masks = jax.tree.map(lambda p: rng.random(p.shape) < 0.5 if p.ndim > 1 and p.size else None, tree)

    def trained_on(tree: Any, masks: Any) -> Any:
        topology = agent_optax.rigl(update_every=2)
        return run(agent_optax.sparsify(optax.adam(0.1), topology, masks=masks, storage=storage), tree)

    trained = trained_on(tree, masks)
    chex.assert_trees_all_equal_structs(trained, tree)
    given = jax.tree.structure(tree).flatten_up_to(masks)
    listed = trained_on(jax.tree.leaves(tree), given)
    chex.assert_trees_all_close(jax.tree.leaves(trained), listed, rtol=1e-6)
    for leaf, mask in zip(listed, given, strict=True):
        assert mask is None or np.count_nonzero(leaf) == mask.sum()


@both_storages
@pytest.mark.parametrize("name", TREES)
def test_active_masks_round_trip(name: str, storage: str) -> None:
    params = TREES[name]
    tx = agent_optax.sparsify(optax.adam(0.1), agent_optax.rigl(), sparsity=0.5, storage=storage)
    masks = agent_optax.active_masks(tx.init(params), params)
    again = agent_optax.sparsify(optax.adam(0.1), agent_optax.rigl(), masks=masks, storage=storage)
    chex.assert_trees_all_equal(agent_optax.active_masks(again.init(params), params), masks)


@both_storages
def test_none_stands_for_a_subtree_of_masks(storage: str) -> None:
    params = {"a": Layer(kernel(0), jnp.ones(5)), "b": Layer(kernel(1), jnp.ones(5))}
    masks = {"a": Layer(np.eye(6, 5, dtype=bool), None), "b": None}
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), masks=masks, storage=storage)
    trained = run(tx, params)
    dense = run_plain(optax.sgd(0.1), params["b"])
    chex.assert_trees_all_close(trained["b"], dense, rtol=1e-6)
    np.testing.assert_array_equal(trained["a"].kernel != 0, np.eye(6, 5, dtype=bool))


def run_plain(tx: Any, params: Any) -> Any:
    opt_state = tx.init(params)
    for _ in range(NUM_STEPS):
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("options", [{"where": Linear(True, False), "sparsity": 0.5}, {"sparsity": Linear(0.5, None)}])
def test_a_choice_may_be_a_tree_that_can_be_called(options: dict[str, Any]) -> None:
    tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.static(), **options)
    params = Linear(kernel(0), jnp.ones(5))
    masks = agent_optax.active_masks(tx.init(params), params)
    assert np.sum(masks.kernel) == 15
    assert masks.bias is None


PREFIX = {"frozen": False, "trained": True}
LABELS = {"frozen": "frozen", "trained": "trained"}
PARAMS = {"frozen": {"kernel": kernel(0)}, "trained": {"kernel": kernel(1), "bias": jnp.ones(5)}}


def partitioned(inner: Any) -> Any:
    return optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, LABELS)


def sparse(inner: Any, storage: str) -> Any:
    return agent_optax.sparsify(inner, agent_optax.rigl(update_every=2), sparsity=0.5, storage=storage)


@both_storages
def test_prefixes_and_frozen_parts_as_optax_allows_them(storage: str) -> None:
    adam = optax.adam(0.05)
    # Frozen or not seen: not a weight is touched, and the rest is trained.
    for tx in (sparse(partitioned(adam), storage), partitioned(sparse(adam, storage))):
        trained = run(tx, PARAMS)
        chex.assert_trees_all_equal(trained["frozen"], PARAMS["frozen"])
        assert np.count_nonzero(trained["trained"]["kernel"]) == 15
        bias = run_plain(adam, PARAMS["trained"])["bias"]
        chex.assert_trees_all_close(trained["trained"]["bias"], bias, rtol=1e-5)
    # masked: others pass through, and are sparse too.
    momentum = lambda mask: optax.chain(optax.masked(optax.trace(0.9), mask), optax.scale(-0.1))  # noqa: E731
    whole = {"frozen": {"kernel": False}, "trained": {"kernel": True, "bias": True}}
    by_prefix, by_leaf = (run(sparse(momentum(mask), storage), PARAMS) for mask in (PREFIX, whole))
    chex.assert_trees_all_equal(by_prefix, by_leaf)
    assert np.count_nonzero(by_prefix["frozen"]["kernel"]) == 15


def test_masks_for_a_frozen_part_need_a_static_topology() -> None:
    masks = jax.tree.map(lambda p: p > 0 if p.ndim > 1 else None, PARAMS)
    inner = partitioned(optax.adam(0.05))
    with pytest.raises(ValueError, match=r"frozen/kernel.*static\(\)"):
        agent_optax.sparsify(inner, agent_optax.rigl(), masks=masks).init(PARAMS)
    trained = run(agent_optax.sparsify(inner, agent_optax.static(), masks=masks), PARAMS)
    np.testing.assert_array_equal(trained["frozen"]["kernel"], np.maximum(PARAMS["frozen"]["kernel"], 0))
