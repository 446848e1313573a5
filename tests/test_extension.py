"""A memory, coefficient, topology, pattern and storage of one's own, each made of `agent_optax.typing` alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import jit

import agent_optax
from agent_optax.typing import (
    ActiveWeights,
    CoefficientState,
    Layer,
    MemoryState,
    Pattern,
    Recalled,
    Storage,
    Topology,
)

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.linspace(-1, 1, 6)}
NUM_STEPS = 6


def gradient(seed: int) -> Any:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(seed), p.shape), PARAMS)


def run(tx: Any, params: Any = PARAMS) -> tuple[list[Any], Any]:
    opt_state = tx.init(params)
    params = agent_optax.mask_params(params, opt_state)
    update, trajectory = jit(tx.update), []
    for step in range(1, NUM_STEPS + 1):
        updates, opt_state = update(gradient(step), opt_state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory, opt_state


# A memory: the gradient of the step before, whose mean is taken to be zero.


class _LastGradFields(NamedTuple):
    last: Any
    has_last: jax.Array


class LastGradState(_LastGradFields, MemoryState):
    def recall(self, grads: Any, extra_args: Any) -> Recalled:
        return Recalled(self.last, jax.tree.map(jnp.zeros_like, grads), self.has_last)


class LastGrad:
    def init(self, params: Any) -> LastGradState:
        return LastGradState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), bool))

    def remember(
        self, memory_state: Any, recalled: Any, grads: Any, corrected: Any, params: Any, extra_args: Any
    ) -> LastGradState:
        return LastGradState(grads, jnp.ones((), bool))

    def default_coefficient(self) -> Any:
        return agent_optax.constant(0.5)


# A coefficient: 1 / (1 + steps).


class _HarmonicFields(NamedTuple):
    correlation: jax.Array
    step: jax.Array


class HarmonicState(_HarmonicFields, CoefficientState):
    pass


class Harmonic:
    def init(self, params: Any) -> HarmonicState:
        return HarmonicState(jnp.ones(()), jnp.zeros((), jnp.int32))

    def prepare(self, coefficient_state: HarmonicState) -> HarmonicState:
        return coefficient_state._replace(correlation=1 / (1 + coefficient_state.step.astype(jnp.float32)))

    def observe(self, coefficient_state: HarmonicState, grads: Any, recalled: Any, extra_args: Any) -> HarmonicState:
        return coefficient_state._replace(step=coefficient_state.step + 1)


def test_a_memory_and_a_coefficient() -> None:
    """g - c_t g_last, and plain SGD from there on."""
    tx = optax.chain(agent_optax.correct_gradients(LastGrad(), Harmonic(), 1.0), optax.sgd(0.1))
    opt_state, params, expected = tx.init(PARAMS), PARAMS, dict(PARAMS)
    for step in range(NUM_STEPS):
        updates, opt_state = jit(tx.update)(gradient(step), opt_state, params)
        params = optax.apply_updates(params, updates)
        last = gradient(step - 1) if step else jax.tree.map(jnp.zeros_like, PARAMS)
        expected = jax.tree.map(
            lambda p, g, old, step=step: p - 0.1 * (g - old / (1 + step)), expected, gradient(step), last
        )
    for name, p in expected.items():
        np.testing.assert_allclose(params[name], p, rtol=1e-5, atol=1e-6)
    assert float(agent_optax.diagnostics(opt_state)["correlation"]) == np.float32(1 / NUM_STEPS)
    assert not agent_optax.diagnostics(opt_state)["variance_ratio_known"]


# A topology: at each third step all masks move one row down.


@dataclasses.dataclass(frozen=True)
class MovingRows(Topology):
    @property
    def interval(self) -> int:
        return 3

    def is_due(self, step: jax.Array) -> jax.Array:
        return step % 3 == 0

    def rewire_layer(self, layer: Layer, step: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.roll(layer.mask, 1, axis=0)


# A pattern: whole rows.


@dataclasses.dataclass(frozen=True)
class Rows(Pattern):
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ValueError(f"{name} has no rows")

    def unit_size(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def random_mask(self, count: int, like: jax.Array, key: jax.Array) -> jax.Array:
        num_rows = count // like.shape[-1]
        order = jax.random.permutation(key, like.shape[0])
        return jnp.broadcast_to((order < num_rows)[:, None], like.shape)

    def allows(self, mask: jax.Array) -> jax.Array:
        return jnp.all(mask == mask[:, :1])


def test_a_topology_and_a_pattern() -> None:
    for storage in ("dense", "compact"):
        tx = agent_optax.sparsify(optax.sgd(0.1), MovingRows(), sparsity=0.5, pattern=Rows(), storage=storage)
        start = np.asarray(agent_optax.active_masks(tx.init(PARAMS), PARAMS)["kernel"])
        assert start.all(axis=1).sum() == start.any(axis=1).sum() == 4
        trajectory, opt_state = run(tx)
        for step, params in enumerate(trajectory, start=1):
            active = np.roll(start, step // 3, axis=0)
            assert not params["kernel"][~active].any()
            if step % 3:  # what has just grown is zero still
                assert params["kernel"][active].all()
        assert int(agent_optax.diagnostics(opt_state)["num_topology_updates"]) == 2


# A storage: for weights that never change place, which keeps the masks and the masked inner state.


class _FixedFields(NamedTuple):
    kept: Any


class FixedActive(_FixedFields, ActiveWeights):
    def masks(self, params: Any) -> Any:
        return self.kept

    def num_active(self) -> jax.Array:
        return sum(jnp.sum(mask, dtype=jnp.int32) for mask in jax.tree.leaves(self.kept))

    def num_ever_active(self) -> jax.Array:
        return self.num_active()


@dataclasses.dataclass(frozen=True)
class Fixed(Storage):
    def start(self, optimizer: Any, start: Any, params: Any, key: jax.Array) -> Any:
        return FixedActive(start.masks), optimizer.inner.init(params)

    def update(self, optimizer: Any, grads: Any, state: Any, params: Any, extra_args: Any) -> Any:
        masks = state.active_weights.kept
        kernel = lambda tree: {**tree, "kernel": jnp.where(masks["kernel"], tree["kernel"], 0)}  # noqa: E731
        updates, inner_state = optimizer.inner.update(kernel(grads), state.inner_state, params, **extra_args)
        updates["kernel"] = jnp.where(masks["kernel"], updates["kernel"], -params["kernel"])
        return updates, state._replace(inner_state=inner_state)


def test_a_storage() -> None:
    masks = {"kernel": np.eye(8, 6, dtype=bool), "bias": None}
    trained = [
        run(agent_optax.sparsify(optax.adam(0.1), agent_optax.static(), masks=masks, storage=storage))[0]
        for storage in (Fixed(), "dense")
    ]
    for own, dense in zip(*trained, strict=True):
        np.testing.assert_allclose(own["kernel"], dense["kernel"], rtol=1e-6)
