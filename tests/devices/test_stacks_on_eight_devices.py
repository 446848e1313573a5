"""Stacked layers, attention and constant fan-in on a mesh of eight devices: the numbers of one device."""

from typing import Any, NamedTuple

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scanned_transformer
from conformance import jit
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agent_optax

pytestmark = pytest.mark.devices


SHAPES = {"experts": (4, 16, 8), "query": (16, 2, 8), "out": (2, 8, 16)}
LAYOUTS = {
    "stack": {
        "experts": PartitionSpec("x", None, "y"),
        "query": PartitionSpec("x", "y", None),
        "out": PartitionSpec("y", None, "x"),
    },
    "inputs": {
        "experts": PartitionSpec(None, "x", "y"),
        "query": PartitionSpec(None, None, "x"),
        "out": PartitionSpec(None, "x", None),
    },
}


class Options(NamedTuple):
    """What differs between runs."""

    topology: Any
    storage: str = "dense"
    pattern: Any = None


CASES = {
    "rigl, compact, fan_in": Options(agent_optax.rigl(2), "compact", agent_optax.fan_in(group=2)),
    "rigl, n_m": Options(agent_optax.rigl(2), "dense", agent_optax.n_m(2, 4)),
    "rigl, padded blocks": Options(agent_optax.rigl(2), "dense", agent_optax.blocks((3, 3))),
    "set_, ablation": Options(agent_optax.set_(2), "dense", agent_optax.fan_in(ablation=0.5)),
    "snfs": Options(agent_optax.snfs(2)),
    "gradual_pruning": Options(agent_optax.gradual_pruning(stop=4, update_every=2), "dense", agent_optax.fan_in()),
}


def initial_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def trained(options: Options, params: Any) -> tuple[Any, Any]:
    sparsity = None if options.pattern is not None and options.pattern.density else 0.75
    tx = agent_optax.sparsify(
        optax.adam(0.1), options.topology, sparsity=sparsity, storage=options.storage, pattern=options.pattern
    )
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)

    @jit
    def step(params: Any, opt_state: Any, t: jax.Array) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda p: jnp.sin(9 * p + t), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(5):
        params, opt_state = step(params, opt_state, jnp.asarray(t, jnp.float32))
    return params, agent_optax.active_masks(opt_state, params)


if not eight_devices.ARE_HERE:

    @pytest.mark.parametrize("part", ["Auto", "Explicit"])
    def test_on_eight_devices(part: str, pytestconfig: pytest.Config) -> None:
        eight_devices.run_tests(__file__, part, pytestconfig.rootpath)

else:

    @pytest.mark.filterwarnings("ignore:.*is split over devices:UserWarning")
    @pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("case", CASES)
    def test_numbers_and_layout_of_one_device(case: str, layout: str, axis_type: str) -> None:
        expected = trained(CASES[case], initial_params())
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, axis_type),) * 2)
        with eight_devices.set_mesh(mesh):
            shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS[layout].items()}
            params = {name: jax.device_put(p, shardings[name]) for name, p in initial_params().items()}
            params, masks = trained(CASES[case], params)
        assert all(params[name].sharding.is_equivalent_to(shardings[name], 3) for name in SHAPES)
        jax.tree.map(np.testing.assert_array_equal, masks, expected[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected[0])

    @pytest.mark.parametrize("storage", ["dense", "compact"])
    def test_a_scanned_transformer_under_auto_sharding_of_its_layers(storage: str) -> None:
        params = scanned_transformer.initial_params()
        masks = agent_optax.magnitude_masks(params, 0.8, scope="layer")
        expected = scanned_transformer.trained(True, params, masks, storage, None)
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        by_layer, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
        params = {name: jax.device_put(p, by_layer if name == "blocks" else whole) for name, p in params.items()}
        with eight_devices.set_mesh(mesh):
            found = scanned_transformer.trained(True, params, masks, storage, None)
        jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found[1], expected[1])
