"""What NNX models keep beside parameters, and what the second evaluation and the refresh pass may do to it: nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import agent_optax
import agent_optax.flax

BATCH = jax.random.normal(jax.random.key(1), (16, 6))
BATCHES = jax.random.normal(jax.random.key(2), (5, 16, 6))


class Model(nnx.Module):
    def __init__(self, seed: int = 0, rate: float = 0.5):
        rngs = nnx.Rngs(params=seed, dropout=seed + 1)
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.output = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model: Model, batch: jax.Array) -> jax.Array:
    return jnp.mean((model(batch) - jnp.sin(batch[:, :1])) ** 2)


def snapshot_optimizer(model: Model, **options: Any) -> nnx.Optimizer:
    correction = agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0)
    return nnx.Optimizer(model, optax.chain(correction, optax.sgd(0.1)), wrt=nnx.Param, **options)


def others(model: Model) -> dict[str, Any]:
    """All that a model holds beside its parameters."""
    state = nnx.state(model, nnx.Not(nnx.Param))
    return {str(path): jax.device_get(_data(v)) for path, v in jax.tree_util.tree_leaves_with_path(state)}


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def arrays(state: Any) -> Any:
    return nnx.to_pure_dict(state)


def test_first_evaluation_is_that_of_nnx_and_the_second_leaves_no_trace() -> None:
    model, plain_model = Model(), Model()
    optimizer = snapshot_optimizer(model)
    before = others(model)
    (value, grads), extras = agent_optax.flax.nnx.value_and_grads(loss_fn)(model, optimizer, BATCH)
    plain_value, plain_grads = nnx.value_and_grad(loss_fn)(plain_model, BATCH)
    assert set(extras) == {"value", "old_value", "old_grads"}
    assert_equal((value, arrays(grads)), (plain_value, arrays(plain_grads)))
    assert_equal(others(model), others(plain_model))
    changed = {name for name, leaf in others(model).items() if not np.array_equal(leaf, before[name])}
    assert {name.split("'")[1] for name in changed} == {"norm", "dropout"}  # statistics and a counter


def test_both_evaluations_draw_the_same_dropout_mask() -> None:
    """At the snapshot itself old and new gradients are equal, which two dropout masks would not give."""
    model = Model()
    optimizer = snapshot_optimizer(model)
    grads_fn = agent_optax.flax.nnx.value_and_grads(loss_fn)
    (value, grads), extras = grads_fn(model, optimizer, BATCH)
    assert_equal((value, arrays(grads)), (extras["old_value"], arrays(extras["old_grads"])))
    (next_value, _), _ = grads_fn(model, optimizer, BATCH)
    assert float(next_value) != float(value)  # the next step has another mask


def test_generators_given_as_arguments_are_shared_and_drawn_from_once() -> None:
    class Noisy(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 1, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
            return self.linear(x + jax.random.normal(rngs.noise(), x.shape))

    model, rngs = Noisy(), nnx.Rngs(noise=3)
    optimizer = snapshot_optimizer(model)
    grads_fn = agent_optax.flax.nnx.value_and_grads(lambda model, x, rngs: jnp.mean(model(x, rngs) ** 2))
    (value, _), extras = grads_fn(model, optimizer, BATCH, rngs)
    assert float(value) == float(extras["old_value"])
    assert int(rngs.noise.count[...]) == 1


def test_old_gradient_is_that_of_the_snapshot() -> None:
    model, old_model = Model(rate=0.0), Model(seed=5, rate=0.0)
    optimizer = snapshot_optimizer(old_model)
    (_, _), extras = agent_optax.flax.nnx.value_and_grads(loss_fn)(model, optimizer, BATCH)
    old_value, old_grads = nnx.value_and_grad(loss_fn)(Model(seed=5, rate=0.0), BATCH)
    np.testing.assert_allclose(extras["old_value"], old_value, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        arrays(extras["old_grads"]),
        arrays(old_grads),
    )


def test_auxiliary_output_and_a_gradient_alone() -> None:
    model = Model()

    def with_aux(model: Model, batch: jax.Array) -> Any:
        output = model(batch)
        return jnp.mean(output**2), output

    (value, grads), extras = agent_optax.flax.nnx.value_and_grads(with_aux, has_aux=True)(
        model, snapshot_optimizer(model), BATCH
    )
    assert value[1].shape == (16, 1) and extras["value"] is value[0] and extras["old_value"].shape == ()
    plain = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    (value, grads), extras = agent_optax.flax.nnx.value_and_grads(with_aux, has_aux=True)(model, plain, BATCH)
    assert set(extras) == {"value"} and extras["value"] is value[0]
    plain.update(model, grads, **extras)


@pytest.mark.parametrize("is_iterator", [False, True])
def test_refresh_leaves_the_model_alone_and_compiles_once(is_iterator: bool) -> None:
    model = Model()
    optimizer = snapshot_optimizer(model)
    num_traced = 0

    def counted(model: Model, batch: jax.Array) -> jax.Array:
        nonlocal num_traced
        num_traced += 1
        return loss_fn(model, batch)

    before, params = others(model), arrays(nnx.state(model, nnx.Param))
    agent_optax.flax.nnx.refresh(counted, model, optimizer, iter(BATCHES) if is_iterator else BATCHES)
    assert_equal(others(model), before)
    assert_equal(arrays(nnx.state(model, nnx.Param)), params)
    memory_state = agent_optax.flax.nnx.opt_state(optimizer)[0].memory_state
    assert bool(memory_state.is_refreshed)
    assert_equal(arrays(memory_state.snapshot), params)
    assert float(jnp.abs(memory_state.mean_grads["output"]["kernel"]).max()) > 0

    first = num_traced
    loss_fn(model, BATCH)  # statistics and counters move: new arrays, the same program
    agent_optax.flax.nnx.refresh(counted, model, optimizer, iter(BATCHES) if is_iterator else BATCHES)
    assert num_traced == first


def test_refresh_draws_a_dropout_mask_for_each_batch() -> None:
    """The mean over equal batches is no gradient of one mask, and repeats itself only from the same counters."""
    model, batches = Model(), jnp.stack([BATCH] * 4)
    optimizer = snapshot_optimizer(model)

    def mean_grads(batches: Any) -> Any:
        agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, batches)
        return arrays(agent_optax.flax.nnx.opt_state(optimizer)[0].memory_state.mean_grads)

    of_four, again, of_one = mean_grads(batches), mean_grads(batches), mean_grads(batches[:1])
    assert_equal(of_four, again)
    assert not np.allclose(of_four["output"]["kernel"], of_one["output"]["kernel"], rtol=1e-2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), mean_grads(iter(batches)), of_four
    )


def test_sparse_updates_reach_a_model_of_which_a_part_is_trained() -> None:
    """LoRA on a frozen base: `wrt` selects the factors, `named` makes them sparse, the base does not move."""
    model = nnx.LoRALinear(6, 4, lora_rank=4, rngs=nnx.Rngs(0))
    tx = agent_optax.sparsify(
        agent_optax.agent(0.1),
        agent_optax.rigl(update_every=2),
        sparsity=0.5,
        where=agent_optax.named("*lora_[ab]"),
        storage="compact",
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    agent_optax.flax.nnx.mask_model(model, optimizer)
    agent_optax.flax.nnx.refresh(loss_fn, model, optimizer, BATCHES)
    base, factor = model.kernel[...], model.lora.lora_b[...]

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model: Any, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
        (value, grads), extras = agent_optax.flax.nnx.value_and_grads(loss_fn)(model, optimizer, batch)
        optimizer.update(model, grads, **extras)
        return value

    base, factor = np.asarray(base), np.asarray(factor)
    values = [float(step(model, optimizer, BATCH)) for _ in range(6)]
    assert values[-1] < values[0]
    np.testing.assert_array_equal(model.kernel[...], base)
    assert not np.array_equal(model.lora.lora_b[...], factor)
    opt_state = agent_optax.flax.nnx.opt_state(optimizer)
    assert float(agent_optax.diagnostics(opt_state)["sparsity"]) == pytest.approx(0.5, abs=0.03)
    masks = agent_optax.active_masks(opt_state, _pure(model))
    for mask, factor in zip(jax.tree.leaves(masks), jax.tree.leaves(_pure(model)), strict=True):
        assert not np.any(np.asarray(factor)[~np.asarray(mask)])
    assert int(agent_optax.diagnostics(opt_state)["num_topology_updates"]) == 3


def _pure(model: Any) -> Any:
    state = nnx.state(model, nnx.LoRAParam)
    return nnx.as_pure(state) if hasattr(nnx, "as_pure") else nnx.pure(state)


@pytest.mark.parametrize(
    ("mistake", "error", "parts"),
    [
        (lambda m, o: agent_optax.flax.nnx.opt_state(o.opt_state), TypeError, ("got tuple", "nnx.Optimizer(model, tx")),
        (
            lambda m, o: agent_optax.flax.nnx.value_and_grads(loss_fn)(m, o.tx, BATCH),
            TypeError,
            ("got GradientTransformationExtraArgs", "wrt=nnx.Param"),
        ),
        (lambda m, o: agent_optax.flax.nnx.mask_model(m, o), ValueError, ("holds no sparse optimizer",)),
        (
            lambda m, o: agent_optax.flax.nnx.refresh(loss_fn, m, o, (BATCHES, BATCHES[:3])),
            ValueError,
            ("'[0]': 5, '[1]': 3", "pass an iterator"),
        ),
        (lambda m, o: agent_optax.flax.nnx.refresh(loss_fn, m, o, None), TypeError, ("got None",)),
        (lambda m, o: agent_optax.flax.nnx.refresh(loss_fn, m, o, iter([])), ValueError, ("got no batch",)),
    ],
)
def test_message(mistake: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    model = Model()
    with pytest.raises(error) as raised:
        mistake(model, snapshot_optimizer(model))
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)
