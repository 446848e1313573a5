"""The cases of the registry under explicit sharding, on a mesh of eight devices, in a process that has them."""

import re
from typing import Any

import chex
import eight_devices
import jax
import optax
import pytest
from conformance import CASES, TYPICAL_CASES, Case, initial_params, jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agent_optax

GATHERS = r"all-gather|all-to-all|collective-permute"

# Inner optimizers that keep their state as momentum does are left out.
LAID_OUT_CASES = TYPICAL_CASES | {
    name: case
    for name, case in CASES.items()
    if not name.startswith(("sparsify-rigl-", "sparsify-compact-rigl-", "correct"))
}

PARTITION = {
    "dense": {"bias": PartitionSpec("x"), "kernel": PartitionSpec("x", None)},
    "gain": PartitionSpec(),
}


def sharded_params(case: Case, mesh: jax.sharding.Mesh) -> optax.Params:
    def place(p: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(p, NamedSharding(mesh, spec if case.takes_sharded else PartitionSpec(*(None,) * p.ndim)))

    return jax.tree.map(place, initial_params(), PARTITION)


def types(tree: Any) -> Any:
    """Shape, dtype and sharding of every leaf, as text."""
    return jax.tree.map(lambda leaf: str(jax.typeof(leaf)), tree)


if not eight_devices.ARE_HERE:

    @pytest.mark.parametrize("part", ["sharding_types", pytest.param("not sharding_types", marks=pytest.mark.devices)])
    def test_on_eight_devices(part: str, pytestconfig: pytest.Config) -> None:
        eight_devices.run_tests(__file__, part, pytestconfig.rootpath)

else:

    @pytest.fixture
    def mesh() -> jax.sharding.Mesh:
        return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))

    @pytest.mark.parametrize("case", LAID_OUT_CASES.values(), ids=LAID_OUT_CASES.keys())
    def test_sharding_types(case: Case, mesh: jax.sharding.Mesh) -> None:
        with eight_devices.set_mesh(mesh):
            tx = case.make()
            params = sharded_params(case, mesh)
            started = jax.eval_shape(lambda params: case.start(tx, params), params)
            stepped = jax.eval_shape(lambda *both: case.run(tx, *both), *started)  # a scan: its carry is stable too
            assert types(stepped) == types(started)
            assert types(started[0]) == types(params)

            def lies_like_its_parameter(leaf: Any, param: jax.Array) -> None:
                if not isinstance(leaf, optax.MaskedNode) and leaf.shape == param.shape:
                    assert jax.typeof(leaf).sharding == jax.typeof(param).sharding

            optax.tree.map_params(
                tx,
                lies_like_its_parameter,
                started[1],
                params,
                is_leaf=lambda node: isinstance(node, optax.MaskedNode),
            )

    @pytest.mark.parametrize("case", TYPICAL_CASES.values(), ids=TYPICAL_CASES.keys())
    def test_values_equal_those_of_one_device(case: Case, mesh: jax.sharding.Mesh) -> None:
        tx = case.make()
        expected = jit(lambda params: case.run(tx, *case.start(tx, params)))(initial_params())
        with eight_devices.set_mesh(mesh):
            params = sharded_params(case, mesh)
            result = jit(lambda params: case.run(tx, *case.start(tx, params)))(params)
            assert len(result[0]["dense"]["kernel"].sharding.device_set) == 8
            result, expected = comparable(case, result), comparable(case, expected)
        chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), rtol=2e-5, atol=2e-6)

    def comparable(case: Case, run: tuple[Any, Any]) -> Any:
        """Compact storage holds rows where a leaf is split: what they stand for is compared."""
        if "compact" not in case.name:
            return run
        params, opt_state = run
        masks = jax.tree.leaves(agent_optax.active_masks(opt_state, params))
        return params, masks, agent_optax.diagnostics(opt_state)

    @pytest.mark.parametrize(
        "name", ["sparsify-rigl-momentum", "sparsify-set_-momentum", "sparsify-compact-rigl-agent"]
    )
    def test_topology_update_gathers_nothing(name: str, mesh: jax.sharding.Mesh) -> None:
        case = CASES[name]
        tx = case.make()
        with eight_devices.set_mesh(mesh):
            params = sharded_params(case, mesh)
            opt_state = jax.jit(tx.init)(params)
            program = jax.jit(tx.update).lower(params, opt_state, params, old_grads=params).compile().as_text()
        assert "all-reduce" in program
        assert not re.search(GATHERS, program)

    @pytest.mark.parametrize(
        "pattern", [agent_optax.n_m(2, 4), agent_optax.blocks((2, 2)), agent_optax.output_channels()]
    )
    def test_tiles_that_lie_on_one_device_are_not_gathered(pattern: Any, mesh: jax.sharding.Mesh) -> None:
        sparsity = None if pattern.density else 0.5
        tx = agent_optax.sparsify(optax.sgd(0.1), agent_optax.rigl(update_every=1), sparsity=sparsity, pattern=pattern)
        with eight_devices.set_mesh(mesh):
            rows = NamedSharding(mesh, PartitionSpec("x", None))
            params = jax.device_put(jax.random.normal(jax.random.key(0), (32, 6)), rows)
            opt_state = jax.jit(tx.init)(params)
            program = jax.jit(tx.update).lower(params, opt_state, params).compile().as_text()
        assert not re.search(GATHERS, program)

    def test_masks_of_a_network_lie_where_it_does(mesh: jax.sharding.Mesh) -> None:
        """In rounds, whose loop keeps its types, and of groups."""
        magnitude = lambda params: jax.tree.map(jax.numpy.abs, params)  # noqa: E731
        by_layer = {"scope": "layer", "pattern": agent_optax.fan_in()}
        params = {"kernel": jax.random.normal(jax.random.key(0), (32, 6))}
        expected = [agent_optax.score_masks(magnitude, params, 0.75, rounds=3, **o) for o in ({}, by_layer)]
        with eight_devices.set_mesh(mesh):
            rows = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x", None)))
            for masks, options in zip(expected, ({}, by_layer), strict=True):
                found = agent_optax.score_masks(magnitude, rows, 0.75, rounds=3, **options)
                assert jax.typeof(found["kernel"]).sharding == jax.typeof(rows["kernel"]).sharding
                chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(masks))
