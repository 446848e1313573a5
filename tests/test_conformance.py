"""What Optax asks of every transform, checked on every case of the registry."""

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    CASES,
    LEARNING_RATE,
    NUM_STEPS,
    REPRESENTATIVE_CASES,
    TYPICAL_CASES,
    Case,
    all_but,
    initial_params,
    jit,
    loss,
)

import agent_optax


def each(cases: Mapping[str, Case]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def assert_close(actual: Any, expected: Any) -> None:
    """Equal up to rounding: the compiler may fuse two programs differently."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-6)


def assert_same(actual: Any, expected: Any) -> None:
    """The very same leaves."""
    chex.assert_trees_all_equal_structs(actual, expected)
    assert all(a is e for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


def types(tree: Any) -> Any:
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@functools.cache
def start(name: str) -> tuple[optax.Params, optax.OptState]:
    case = CASES[name]
    return jit(lambda params: case.start(case.make(), params))(initial_params())


@functools.cache
def after_separate_steps(name: str) -> tuple[optax.Params, optax.OptState, int]:
    """Parameters and state after NUM_STEPS calls with an unknown keyword, and how often the step was traced.

    The calls donate parameters and state, as training loops do: a donation that cannot be used warns, and warnings are
    errors.
    """
    case, num_traced = CASES[name], 0
    tx = case.make()

    @functools.partial(jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, index: Any) -> Any:
        nonlocal num_traced
        num_traced += 1
        return case.step(tx, params, opt_state, index, unexpected_extra_argument=jnp.ones(2))

    params, opt_state = jax.tree.map(jnp.copy, start(name))
    for index in range(NUM_STEPS):
        donated = [leaf for leaf in jax.tree.leaves((params, opt_state)) if leaf.size > 1]
        params, opt_state = step(params, opt_state, index)
        assert all(leaf.is_deleted() for leaf in donated)
    return params, opt_state, num_traced


def run_from_the_start(case: Case, tx: Any, loss_fn: Any = None) -> tuple[optax.Params, optax.OptState]:
    return jit(lambda params: case.run(tx, *case.start(tx, params, loss_fn), loss_fn))(initial_params())


def makes_an_optimizer_or_a_part(function: Any) -> bool:
    returned = function.__annotations__.get("return")
    returned = eval(returned, function.__globals__) if isinstance(returned, str) else returned
    kinds = typing.get_args(returned) or (returned,)
    parts = ("remember", "observe", "rewire")  # of a memory, a coefficient, a topology
    return optax.GradientTransformationExtraArgs in kinds or any(hasattr(k, part) for k in kinds for part in parts)


def test_every_public_transform_is_in_the_registry() -> None:
    functions = {name: getattr(agent_optax, name) for name in agent_optax.__all__}
    functions = {name: function for name, function in functions.items() if inspect.isfunction(function)}
    tested = {word for name in CASES for word in name.split("-")}
    assert {name for name, function in functions.items() if makes_an_optimizer_or_a_part(function)} - tested == set()


@each(TYPICAL_CASES)
def test_accepts_an_unknown_keyword_compiles_once_and_donates(case: Case) -> None:
    params, opt_state, num_traced = after_separate_steps(case.name)
    assert num_traced == 1
    assert types((params, opt_state)) == types(start(case.name))
    moved = jax.tree.map(lambda p, q: bool(jnp.any(p != q)), params, initial_params())
    assert all(jax.tree.leaves(moved))


@each(all_but(CASES, TYPICAL_CASES))
def test_accepts_an_unknown_keyword_and_keeps_all_types(case: Case) -> None:
    """Traced, not compiled: equal types are not traced again."""
    tx = case.make()
    started = jax.eval_shape(lambda params: case.start(tx, params), initial_params())
    stepped = jax.eval_shape(lambda *both: case.step(tx, *both, 0, unexpected_extra_argument=jnp.ones(2)), *started)
    assert types(stepped) == types(started)
    assert jax.tree.structure(stepped) == jax.tree.structure(started)


@each(TYPICAL_CASES)
def test_init_works_under_jit_and_shares_no_buffer_with_the_parameters(case: Case) -> None:
    params = initial_params()
    opt_state = case.make().init(params)
    _, under_jit = start(case.name)
    assert types(opt_state) == types(under_jit)
    if not case.has_snapshot:  # else refreshed since
        chex.assert_trees_all_equal(opt_state, under_jit)
    jax.block_until_ready(jax.jit(lambda *both: both, donate_argnums=(0, 1))(params, opt_state))  # else: donated twice


@each(REPRESENTATIVE_CASES)
def test_inject_hyperparams_scan_and_cond_change_nothing(case: Case) -> None:
    tx = optax.inject_hyperparams(case.factory, static_args=case.static_args)(**case.hyperparams)
    params, opt_state = run_from_the_start(case, tx)
    assert_close((params, opt_state.inner_state), after_separate_steps(case.name)[:2])


@each(all_but(CASES, REPRESENTATIVE_CASES))
def test_inject_hyperparams_changes_no_type(case: Case) -> None:
    """Traced, not compiled: what is particular to a case shows there."""
    tx = optax.inject_hyperparams(case.factory, static_args=case.static_args)(**case.hyperparams)
    started = jax.eval_shape(lambda params: case.start(tx, params), initial_params())
    assert types(started[1].inner_state) == types(
        jax.eval_shape(lambda p: case.start(case.make(), p), initial_params())[1]
    )
    assert types(jax.eval_shape(lambda *both: case.step(tx, *both, 0), *started)) == types(started)


@each({name: case for name, case in REPRESENTATIVE_CASES.items() if case.is_sparse})
def test_without_donation_the_same_numbers(case: Case) -> None:
    tx = case.make()
    step = jit(lambda params, opt_state, index: case.step(tx, params, opt_state, index))
    params, opt_state = start(case.name)
    for index in range(NUM_STEPS):
        params, opt_state = step(params, opt_state, index)
    chex.assert_trees_all_equal((params, opt_state), after_separate_steps(case.name)[:2])


@each(CASES)
def test_map_params_does_nothing(case: Case) -> None:
    tx = case.make()
    params, opt_state = jax.eval_shape(lambda params: case.start(tx, params), initial_params())
    same = optax.tree.map_params(tx, lambda leaf: leaf, opt_state)
    assert_same(same, opt_state)
    visited = []

    def visit(leaf: Any, param: jax.Array, name: str) -> Any:
        visited.append((name, isinstance(leaf, optax.MaskedNode)))
        return leaf

    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    same = optax.tree.map_params(
        tx, visit, opt_state, params, names, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
    assert_same(same, opt_state)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{name}-{dtype}")
        for name, case in CASES.items()
        for dtype in ("bfloat16", "float16", "float32", "float64")
        if dtype in ("bfloat16", "float32") or name in TYPICAL_CASES
    ],
)
def test_types_are_stable(case: Case, dtype: str, x64: None) -> None:
    tx = case.make()

    def step(params: Any, opt_state: Any, is_taken: Any) -> Any:
        grads, extras = case.evaluate(params, opt_state, 0)
        for name in ("value", "old_value"):  # a loss may be kept in another precision
            if name in extras:
                extras[name] = extras[name].astype("bfloat16" if dtype == "float16" else "float16")

        def take() -> Any:
            updates, stepped = tx.update(grads, opt_state, params, **extras)
            dtypes = {leaf.dtype for leaf in jax.tree.leaves(updates)}
            assert {d for d in dtypes if jnp.issubdtype(d, jnp.floating)} == {jnp.dtype(dtype)}
            return optax.apply_updates(params, updates), stepped

        return jax.lax.cond(is_taken, take, lambda: (params, opt_state))

    started = jax.eval_shape(lambda: case.start(tx, initial_params(dtype)))
    assert {leaf.dtype for leaf in jax.tree.leaves(started[0])} == {jnp.dtype(dtype)}
    assert types(jax.eval_shape(step, *started, True)) == types(started)


@each(REPRESENTATIVE_CASES)
def test_multi_steps_updates_every_fourth_time(case: Case) -> None:
    tx = optax.MultiSteps(case.make(), every_k_schedule=4)

    @jit
    def four_updates(params: Any) -> Any:
        params, opt_state = case.start(tx, params)

        def body(opt_state: Any, index: Any) -> Any:
            grads, extras = case.evaluate(params, opt_state, index)
            updates, opt_state = tx.update(grads, opt_state, params, **extras)
            return opt_state, updates

        return jax.lax.scan(body, opt_state, jnp.arange(4))[1]

    for updates in jax.tree.leaves(four_updates(initial_params())):
        if "multi_steps" not in case.name:  # accumulating twice takes longer
            assert jnp.any(updates[3] != 0)
        np.testing.assert_array_equal(updates[:3], 0)


@each(
    {name: CASES[name] for name in ("agent", "storm", "mars", "sparsify-rigl-momentum", "sparsify-compact-rigl-agent")}
)
def test_a_constant_schedule_equals_the_scalar(case: Case) -> None:
    tx = case.make(learning_rate=optax.constant_schedule(LEARNING_RATE))
    params, _ = run_from_the_start(case, tx)
    assert_close(params, after_separate_steps(case.name)[0])


@each(REPRESENTATIVE_CASES)
def test_vmap_over_seeds_equals_one_seed(case: Case) -> None:
    def train(params: Any, key: Any) -> Any:
        tx = case.make(key=key) if case.is_sparse else case.make()
        return case.run(tx, *case.start(tx, params))

    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), initial_params(seed=0), initial_params(seed=10))
    train = jit(jax.vmap(train))
    swap = lambda tree: jax.tree.map(lambda leaf: leaf[::-1], tree)  # noqa: E731
    result = train(params, keys)
    assert_close(jax.tree.map(lambda leaf: leaf[0], result), after_separate_steps(case.name)[:2])
    chex.assert_trees_all_equal(swap(result), train(swap(params), swap(keys)))
    if case.is_sparse and "set_" in case.name:
        assert jnp.any((result[0]["dense"]["kernel"][0] != 0) != (result[0]["dense"]["kernel"][1] != 0))


def covered(tree: Any) -> Any:
    """The part of the parameters that the wrappers below leave to the optimizer under test."""
    return {"dense": {"kernel": tree["dense"]["kernel"]}, "gain": tree["gain"]}


IS_COVERED = {"dense": {"bias": False, "kernel": True}, "gain": True}
LABELS = jax.tree.map(lambda is_covered: "tested" if is_covered else "other", IS_COVERED)


@functools.cache
def after_covered_run(name: str) -> optax.Params:
    case = CASES[name]
    tx = case.make()
    return jit(lambda params: case.run(tx, *case.start(tx, params)))(covered(initial_params()))[0]


def covered_loss(params: Any, batch: Any) -> jax.Array:
    return loss(covered(params), covered(batch))


@each(REPRESENTATIVE_CASES)
def test_chained_equals_alone(case: Case) -> None:
    tx = optax.chain(optax.scale(1.0), case.make(), optax.identity())
    assert_close(run_from_the_start(case, tx)[0], after_separate_steps(case.name)[0])


@each(REPRESENTATIVE_CASES)
def test_masked_equals_alone(case: Case) -> None:
    params, _ = run_from_the_start(case, optax.masked(case.make(), IS_COVERED), covered_loss)
    assert_close(covered(params), after_covered_run(case.name))


@each(REPRESENTATIVE_CASES)
def test_partitioned_equals_alone(case: Case) -> None:
    tx = optax.partition({"tested": optax.chain(case.make()), "other": optax.adam(0.1)}, LABELS)
    params, _ = run_from_the_start(case, tx, covered_loss)
    assert_close(covered(params), after_covered_run(case.name))


@each(all_but(TYPICAL_CASES, REPRESENTATIVE_CASES))
def test_every_wrapper_takes_it(case: Case) -> None:
    """Traced, not compiled."""
    tx, params = case.make(), initial_params()
    accumulating = optax.MultiSteps(tx, every_k_schedule=4).gradient_transformation()
    others = {"tested": tx, "other": optax.adam(0.1)}
    for wrapped, loss_fn in (
        (optax.chain(optax.scale(1.0), tx, optax.identity()), None),
        (accumulating, None),
        (optax.masked(tx, IS_COVERED), covered_loss),
        (optax.partition(others, LABELS), covered_loss),
    ):
        run = functools.partial(
            lambda params, tx, loss_fn: case.run(tx, *case.start(tx, params, loss_fn), loss_fn),
            tx=wrapped,
            loss_fn=loss_fn,
        )
        assert types(jax.eval_shape(run, params)[0]) == types(jax.eval_shape(lambda params: params, params))
        stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
        assert types(jax.eval_shape(jax.vmap(run), stacked)[0]) == types(jax.eval_shape(lambda params: params, stacked))
