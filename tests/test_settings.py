"""Settings of JAX that users turn on: checks for NaN, strict dtypes, transfer guards, manual sharding, scopes."""

import contextlib
import inspect
import traceback
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import CASES, REPRESENTATIVE_CASES, TYPICAL_CASES, Case, initial_params, jit
from jax.experimental.compute_on import compute_on
from jax.sharding import AxisType, PartitionSpec

import agent_optax

# Plain Optax adds integers to floats in the step counts of these, which strict promotion refuses.
PACKAGES = ("agent_optax", "optax")
REFUSED_BY_OPTAX = ("adam", "mars", "muon", "multi_steps", "partition", "schedule_free")
NOT_IN_SHARD_MAP = ("multi_steps", "bayesian_rewiring")  # optax.MultiSteps and jax.random.multinomial are not either
HAS_COMPUTE_ON = "out_memory_spaces" not in inspect.signature(compute_on).parameters  # a function, since jax 0.11
both_storages = pytest.mark.parametrize("storage", ["dense", "compact"])


@contextlib.contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def each(cases: Any) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@each(TYPICAL_CASES)
def test_no_nan_is_ever_computed(case: Case) -> None:
    """From the first line on, when nothing is known yet."""
    with setting("jax_debug_nans", True):
        tx = case.make()
        agent_optax.diagnostics(tx.init(initial_params()))
        params, opt_state = jit(lambda params: case.start(tx, params))(initial_params())
        _, opt_state = jit(lambda params, opt_state: case.run(tx, params, opt_state))(params, opt_state)
        numbers = agent_optax.diagnostics(opt_state)
    assert all(np.isfinite(number).all() for number in jax.tree.leaves(numbers))


@each(CASES)
def test_dtypes_are_never_promoted_unasked(case: Case) -> None:
    tx = case.make()
    with setting("jax_numpy_dtype_promotion", "strict"):
        try:
            jax.eval_shape(lambda params: case.run(tx, *case.start(tx, params)), initial_params())
        except Exception as error:  # jax.dtypes.TypePromotionError, which older versions of jax do not export
            assert type(error).__name__ == "TypePromotionError"
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            last = {name: max([i for i, f in enumerate(files) if f"/{name}/" in f], default=-1) for name in PACKAGES}
            is_optax_own = last["optax"] > last["agent_optax"]
            assert is_optax_own and any(name in case.name for name in REFUSED_BY_OPTAX)


@each({name: case for name, case in TYPICAL_CASES.items() if name.endswith(("rigl-momentum", "rigl-agent", "mars"))})
def test_a_compiled_step_transfers_nothing(case: Case) -> None:
    tx = case.make()
    step = jit(lambda params, opt_state, index: case.step(tx, params, opt_state, index))
    params, opt_state = jit(lambda params: case.start(tx, params))(initial_params())
    index = jnp.asarray(0)
    params, opt_state = step(params, opt_state, index)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(params, opt_state, index))


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="jnp.zeros_like forgets what varies between devices")
@each({name: case for name, case in TYPICAL_CASES.items() if not any(other in name for other in NOT_IN_SHARD_MAP)})
def test_seeds_are_trained_each_by_its_own_device(case: Case) -> None:
    """Inside `jax.shard_map`, whose checks are on: what varies between devices is known at every loop and branch."""
    mesh = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,))

    def train(params: Any) -> Any:
        tx = case.make()
        return case.run(tx, *case.start(tx, jax.tree.map(lambda p: p[0], params)))[0]

    stacked = jax.tree.map(lambda p: p[None], initial_params())
    spec = PartitionSpec("seed")
    mapped = jax.shard_map(
        lambda params: jax.tree.map(lambda p: p[None], train(params)), mesh=mesh, in_specs=spec, out_specs=spec
    )
    if case.name not in REPRESENTATIVE_CASES:  # the checks are those of tracing
        jax.eval_shape(mapped, stacked)
        return
    alone = jit(train)(stacked)
    chex.assert_trees_all_close(jax.tree.map(lambda p: p[0], jit(mapped)(stacked)), alone, rtol=1e-5, atol=1e-6)


@both_storages
def test_scopes_and_places_of_the_inner_optimizer_stay(storage: str) -> None:
    """It runs as it is: profiles show its scopes, and what it computes on the host is computed there."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        with jax.named_scope("the_rate"):
            updates = jax.tree.map(lambda u: -0.1 * u, updates)
        if HAS_COMPUTE_ON:
            with compute_on("device_host"):
                updates = jax.tree.map(lambda u: jax.jit(jnp.sin)(u), updates)
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = agent_optax.sparsify(inner, agent_optax.static(), sparsity=0.5, storage=storage)
    params = initial_params()
    arguments = (params, tx.init(params), params)
    program = jax.jit(tx.update).lower(*arguments).as_text(debug_info=True)
    assert "the_rate" in program
    assert not HAS_COMPUTE_ON or '_xla_compute_type = "host"' in program
