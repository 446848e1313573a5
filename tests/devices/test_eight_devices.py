"""Training on a mesh of eight devices, automatic and explicit, data-parallel and with sharded parameters."""

import functools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import agent_optax

pytestmark = pytest.mark.devices


NUM_BATCHES, BATCH_SIZE, EPOCHS, UPDATE_EVERY = 3, 16, 2, 2
SHAPES = {"hidden": (32, 64), "output": (64, 8)}


def initial_params() -> optax.Params:
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32), "bias": jnp.zeros(shape[1])}
        for name, shape in SHAPES.items()
    }


def all_batches() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(NUM_BATCHES, BATCH_SIZE, 32)).astype(np.float32)
    return x, np.argmax(x[..., :8], axis=-1)


def gathered(p: jax.Array) -> jax.Array:
    """The whole parameter where explicit sharding asks the program to say so; the compiler does it by itself else."""
    sharding = jax.typeof(p).sharding
    is_explicit = any(t == AxisType.Explicit for t in sharding.mesh.axis_types)
    return jax.sharding.reshard(p, PartitionSpec()) if is_explicit else p


def loss_fn(params: optax.Params, batch: Any) -> jax.Array:
    params = jax.tree.map(gathered, params)
    hidden = jax.nn.relu(batch[0] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch[1], 8)).mean()


def agent() -> Any:
    correction = agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0)
    return optax.chain(correction, optax.sgd(0.1, momentum=0.9))


def saga() -> Any:
    return optax.chain(agent_optax.correct_gradients(agent_optax.table(NUM_BATCHES), scaling=1.0), optax.adam(0.01))


def sparse(inner: Any, topology: Any, **options: Any) -> Any:
    return agent_optax.sparsify(inner, topology(update_every=UPDATE_EVERY), sparsity=0.75, **options)


OPTIMIZERS = {
    "agent-rigl": lambda: sparse(agent(), agent_optax.rigl),
    "saga-set_": lambda: sparse(saga(), agent_optax.set_),
    "agent-rigl-compact": lambda: sparse(agent(), agent_optax.rigl, storage="compact"),
}


class Layout(NamedTuple):
    axis_type: AxisType
    of_params: PartitionSpec


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WHOLE, SHARDED = PartitionSpec(), PartitionSpec("data")  # one axis: each parameter is split over its first

RUNS = [
    ("agent-rigl", Layout(AUTO, SHARDED)),
    ("agent-rigl", Layout(EXPLICIT, SHARDED)),
    ("saga-set_", Layout(AUTO, WHOLE)),
    ("saga-set_", Layout(EXPLICIT, SHARDED)),
    ("agent-rigl-compact", Layout(AUTO, SHARDED)),
    ("agent-rigl-compact", Layout(EXPLICIT, WHOLE)),
]


def shardings_like(params: optax.Params, tree: Any) -> Any:
    """For each leaf that is shaped like a parameter, or as a stack of them, the sharding of the parameter."""
    of_shape = {p.shape: p.sharding for p in jax.tree.leaves(params)}

    def sharding(leaf: Any) -> NamedSharding:
        like = of_shape.get(leaf.shape)
        stacked = of_shape.get(leaf.shape[1:])
        some = like or stacked or next(iter(of_shape.values()))
        spec = like.spec if like else PartitionSpec(None, *stacked.spec) if stacked else PartitionSpec()
        return NamedSharding(some.mesh, spec)

    return jax.tree.map(sharding, tree)


def begin(tx: Any, params: optax.Params) -> tuple[optax.Params, optax.OptState]:
    # Under automatic sharding the compiler does not know that zeros belong to a parameter: it has to be told.
    mesh = jax.typeof(params["hidden"]["kernel"]).sharding.mesh
    is_automatic = AxisType.Auto in mesh.axis_types
    like = {"out_shardings": shardings_like(params, jax.eval_shape(tx.init, params))} if is_automatic else {}
    opt_state = jax.jit(tx.init, **like)(params)
    return jax.jit(agent_optax.mask_params)(params, opt_state), opt_state


def go_on(
    tx: Any, params: optax.Params, opt_state: optax.OptState, batches: Any, epochs: int
) -> tuple[optax.Params, optax.OptState, list[jax.Array]]:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any, index: Any) -> Any:
        (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=index, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    for _ in range(epochs):
        if optax.tree_utils.tree_get(opt_state, "snapshot") is not None:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
        for i in range(NUM_BATCHES):
            params, opt_state, value = step(params, opt_state, jax.tree.map(lambda x, i=i: x[i], batches), i)
            values.append(value)
    return params, opt_state, values


def train(tx: Any, params: optax.Params, batches: Any) -> tuple[optax.Params, optax.OptState, list[jax.Array]]:
    return go_on(tx, *begin(tx, params), batches, EPOCHS)


@functools.cache
def on_one_device(name: str) -> Any:
    return jax.device_get(train(OPTIMIZERS[name](), initial_params(), jax.tree.map(jnp.asarray, all_batches())))


def bytes_on_the_wire(program: str) -> dict[str, int]:
    """The collective operations of a compiled program, with the bytes that their results hold."""
    widths = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
    widths |= {"s64": 8, "u64": 8, "f64": 8}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    total: dict[str, int] = {}
    for results, kind in re.findall(rf" = (\([^=]*?\)|\S+) ({kinds})(?:-start)?\(", program):
        size = sum(
            widths[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", results)
        )
        total[kind] = total.get(kind, 0) + size
    return total


if not eight_devices.ARE_HERE:

    @pytest.mark.parametrize("part", ["Auto", "not Auto"])  # two, which two processes can run
    def test_on_eight_devices(part: str, pytestconfig: pytest.Config) -> None:
        eight_devices.run_tests(__file__, part, pytestconfig.rootpath)

else:

    def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def place(tree: Any, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    @pytest.mark.parametrize(
        ("name", "layout"), RUNS, ids=[f"{n}-{t.name}-{'sharded' if s else 'whole'}" for n, (t, s) in RUNS]
    )
    def test_training_equals_that_on_one_device(name: str, layout: Layout) -> None:
        expected_params, expected_state, expected_values = on_one_device(name)
        mesh = mesh_of(layout.axis_type)
        with eight_devices.set_mesh(mesh):
            batches = place(all_batches(), mesh, PartitionSpec(None, "data"))
            params, opt_state, values = train(
                OPTIMIZERS[name](), place(initial_params(), mesh, layout.of_params), batches
            )
        assert float(values[-1]) < float(values[0])
        assert int(agent_optax.diagnostics(opt_state)["num_topology_updates"]) == EPOCHS * NUM_BATCHES // UPDATE_EVERY
        np.testing.assert_allclose(values, expected_values, rtol=1e-5)
        assert_close(jax.device_get((params, opt_state)), (expected_params, expected_state))
        for p in jax.tree.leaves(params):
            assert p.sharding.is_equivalent_to(NamedSharding(mesh, layout.of_params), p.ndim)
        follows_parameters(params, opt_state)

    def assert_close(actual: Any, expected: Any) -> None:
        """Sums over samples are added up in another order: rounding differs, and no choice of weights may."""
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            if np.issubdtype(e.dtype, np.floating):
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=2e-6)
            else:
                np.testing.assert_array_equal(a, e)

    def follows_parameters(params: Any, opt_state: Any) -> None:
        expected = shardings_like(params, opt_state)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(opt_state), jax.tree.leaves(expected), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (jax.tree_util.keystr(path), leaf.sharding)

    def test_compact_rows_of_eight_explicit_devices_go_on_on_two() -> None:
        """Each device holds the active entries of its part; the state goes on wherever it is put."""
        tx = OPTIMIZERS["agent-rigl-compact"]()
        expected_params, expected_state, expected_values = on_one_device("agent-rigl-compact")
        mesh = mesh_of(EXPLICIT)
        with eight_devices.set_mesh(mesh):
            params = place(initial_params(), mesh, SHARDED)
            params, opt_state = begin(tx, params)
            kernels = jax.tree.leaves(opt_state.active_weights.indices)
            assert all(i.shape[0] == 8 and i.sharding.spec[0] == "data" for i in kernels)
            batches = place(all_batches(), mesh, PartitionSpec(None, "data"))
            params, opt_state, values = go_on(tx, params, opt_state, batches, EPOCHS - 1)
            spread = jax.tree.map(lambda leaf: leaf.sharding.spec, (params, opt_state))
        written = jax.device_get((params, opt_state))
        mesh = jax.make_mesh((2,), ("data",), (EXPLICIT,), devices=jax.devices()[:2])
        with eight_devices.set_mesh(mesh):
            restored = jax.tree.map(lambda leaf, spec: place(leaf, mesh, spec), written, spread)
            batches = place(all_batches(), mesh, PartitionSpec(None, "data"))
            params, opt_state, last_values = go_on(tx, *restored, batches, 1)
            masks = agent_optax.active_masks(opt_state, params)
        np.testing.assert_allclose([*values, *last_values], expected_values, rtol=1e-5)
        assert_close(jax.device_get(params), expected_params)
        expected_masks = agent_optax.active_masks(expected_state, expected_params)
        assert_close(*(jax.tree.leaves(jax.device_get(m)) for m in (masks, expected_masks)))
        expected = agent_optax.diagnostics(expected_state)
        assert_close(jax.device_get(agent_optax.diagnostics(opt_state)), jax.device_get(expected))

    def test_compact_storage_says_where_it_would_gather() -> None:
        tx = OPTIMIZERS["agent-rigl-compact"]()
        with eight_devices.set_mesh(mesh_of(EXPLICIT)):
            tx.init(place(initial_params(), mesh_of(EXPLICIT), SHARDED))  # a warning would be an error
        with pytest.warns(UserWarning, match=r"kernel is split over devices .*'data'.* explicit axis types"):
            tx.init(place(initial_params(), mesh_of(AUTO), SHARDED))

    @pytest.mark.parametrize("topology", [agent_optax.rigl, agent_optax.set_], ids=["rigl", "set_"])
    def test_topology_update_moves_scalars_only(topology: Any) -> None:
        """Under automatic sharding, where the compiler chooses what to move."""
        mesh = mesh_of(AUTO)
        with eight_devices.set_mesh(mesh):
            tx = sparse(agent(), topology)
            params = place(initial_params(), mesh, SHARDED)
            opt_state = jax.eval_shape(tx.init, params)
            opt_state = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                opt_state,
                shardings_like(params, opt_state),
            )
            update = jax.jit(tx.update).lower(params, opt_state, params, old_grads=params)
            moved = bytes_on_the_wire(update.compile().as_text())
            assert set(moved) == {"all-reduce"}  # no gather, no permutation
            assert 0 < moved["all-reduce"] < 256  # the smallest kernel has 2048

    @pytest.mark.parametrize("name", ["saga-set_", "agent-rigl-compact"])
    def test_training_goes_on_from_a_checkpoint_in_another_layout(name: str, tmp_path: Path) -> None:
        """Written with parameters split over eight devices, read by two, by one, and whole on each of eight."""
        tx = OPTIMIZERS[name]()
        structure = (initial_params(), jax.eval_shape(tx.init, initial_params()))

        def in_layout(num_devices: int, spec: PartitionSpec) -> tuple[Any, Any]:
            mesh = jax.make_mesh((num_devices,), ("data",), (AUTO,), devices=jax.devices()[:num_devices])
            params = place(initial_params(), mesh, spec)
            return params, place(all_batches(), mesh, PartitionSpec(None, "data"))

        params, batches = in_layout(8, SHARDED)
        params, opt_state, _ = go_on(tx, *begin(tx, params), batches, EPOCHS - 1)
        written = jax.device_get((params, opt_state))
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(0, args=ocp.args.StandardSave((params, opt_state)))
            manager.wait_until_finished()
            for num_devices, spec in [(2, SHARDED), (1, WHOLE), (8, WHOLE)]:
                params, batches = in_layout(num_devices, spec)
                target = jax.tree.map(
                    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                    structure,
                    shardings_like(params, structure),
                )
                restored = manager.restore(0, args=ocp.args.StandardRestore(target))
                jax.tree.map(np.testing.assert_array_equal, restored, written)
                assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {num_devices}
                follows_parameters(*restored)
                params, opt_state, _ = go_on(tx, *restored, batches, 1)
                assert_close(jax.device_get((params, opt_state)), on_one_device(name)[:2])
                follows_parameters(params, opt_state)

    def test_counting_bytes() -> None:
        """The count sees a collective of whole tensors where there is one."""
        mesh = mesh_of(AUTO)
        with eight_devices.set_mesh(mesh):
            kernel = place(jnp.ones((32, 64)), mesh, SHARDED)
            gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, WHOLE)).lower(kernel).compile().as_text()
        assert bytes_on_the_wire(gather) == {"all-gather": 4 * 32 * 64}

    @pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["automatic-outside-jit", "explicit-inside-jit"])
    def test_state_starts_where_parameters_lie(axis_type: AxisType) -> None:
        mesh = mesh_of(axis_type)
        tx = sparse(optax.chain(agent_optax.correct_gradients(), optax.trace(0.9)), agent_optax.rigl)
        with eight_devices.set_mesh(mesh):
            params = place(initial_params(), mesh, SHARDED)
            follows_parameters(params, (tx.init if axis_type == AUTO else jax.jit(tx.init))(params))
