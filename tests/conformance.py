"""The registry of optimizers that every conformance test runs over: a new public transform joins `CASES`."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agent_optax

# Most of the time of these tests is XLA compiling small programs: let it compile quickly rather than well.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)

NUM_BATCHES = 3
NUM_STEPS = 4
UPDATE_EVERY = 2  # steps between topology updates: two of them in NUM_STEPS
LEARNING_RATE = 0.1


class Case(NamedTuple):
    """An optimizer under test."""

    name: str
    factory: Callable[..., Any]
    hyperparams: Mapping[str, Any]
    extra_args: tuple[str, ...] = ()  # what update needs, of value, old_value, old_grads and batch_index
    static_args: tuple[str, ...] = ()  # hyperparameters that must stay plain under optax.inject_hyperparams
    has_snapshot: bool = False  # whether `refresh` applies
    takes_sharded: bool = True  # whether pruned leaves may be sharded over devices

    @property
    def is_sparse(self) -> bool:
        return "sparsify" in self.name

    def make(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.hyperparams, **changes})

    def start(self, tx: Any, params: optax.Params, loss_fn: Any = None) -> tuple[optax.Params, optax.OptState]:
        """Parameters and state from which the first step is taken, past two refreshes: there is a correction."""
        loss_fn = loss if loss_fn is None else loss_fn
        opt_state = tx.init(params)
        if self.has_snapshot:
            batches = all_batches(params)
            opt_state = agent_optax.refresh(loss_fn, jax.tree.map(lambda p: 0.8 * p, params), opt_state, batches)
            opt_state = agent_optax.refresh(loss_fn, jax.tree.map(lambda p: 0.9 * p, params), opt_state, batches)
        if self.is_sparse:
            params = agent_optax.mask_params(params, opt_state)
        return params, opt_state

    def evaluate(
        self, params: optax.Params, opt_state: optax.OptState, index: Any, loss_fn: Any = None
    ) -> tuple[optax.Updates, dict[str, Any]]:
        """The gradient of a batch, and the extra arguments that update needs beside it: those and no others."""
        grads_fn = agent_optax.value_and_grads(loss if loss_fn is None else loss_fn)
        batch_index = jnp.asarray(index) % NUM_BATCHES
        batch = jax.tree.map(lambda stacked: stacked[batch_index], all_batches(params))
        (_, grads), extras = grads_fn(params, opt_state, batch)
        available = {**extras, "batch_index": batch_index}
        return grads, {name: available[name] for name in self.extra_args}

    def step(
        self, tx: Any, params: optax.Params, opt_state: optax.OptState, index: Any, loss_fn: Any = None, **unknown: Any
    ) -> tuple[optax.Params, optax.OptState]:
        grads, extras = self.evaluate(params, opt_state, index, loss_fn)
        updates, opt_state = tx.update(grads, opt_state, params, **extras, **unknown)
        return optax.apply_updates(params, updates), opt_state

    def run(self, tx: Any, params: optax.Params, opt_state: optax.OptState, loss_fn: Any = None) -> Any:
        """NUM_STEPS steps in one `lax.scan`, each inside a `lax.cond`."""

        def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
            step = lambda params, opt_state: self.step(tx, params, opt_state, index, loss_fn)  # noqa: E731
            return jax.lax.cond(index < NUM_STEPS, step, lambda *unchanged: unchanged, *carry), None

        return jax.lax.scan(body, (params, opt_state), jnp.arange(NUM_STEPS))[0]


# The problem: one smooth loss an entry, so that every optimizer can be run on it, and no matrix product.


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def initial_params(dtype: Any = jnp.float32, seed: int = 0) -> optax.Params:
    bias, kernel, gain = _normal(seed, (8,)), _normal(seed + 1, (8, 6)), _normal(seed + 2, ())
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {"dense": {"bias": bias, "kernel": kernel}, "gain": gain})


def all_batches(params: optax.Params) -> optax.Params:
    """Targets, one batch an index: a tree like params with a leading axis [NUM_BATCHES]."""
    return jax.tree.map(lambda p: jnp.asarray(_normal(p.size, (NUM_BATCHES, *p.shape)), p.dtype), params)


def loss(params: optax.Params, batch: optax.Params) -> jax.Array:
    entries = jax.tree.map(lambda p, target: jnp.sum(jnp.log(jnp.cosh(p - target))), params, batch)
    return jax.tree.reduce(jnp.add, entries)


# Corrections and their aliases.

_OLD_GRADS = {"extra_args": ("old_grads",)}
_SNAPSHOT = {"extra_args": ("old_grads",), "has_snapshot": True}
_CACHED = {"extra_args": ("batch_index",), "has_snapshot": True}
_TABLE = {"extra_args": ("batch_index",)}


def _correction(name: str, memory: Any, coefficient: Any, hyperparams: Mapping[str, Any], **about: Any) -> Case:
    """`memory()` and `coefficient(**hyperparams)`; memories take nothing that can be injected but where said."""

    def factory(scaling: Any, **hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        return agent_optax.correct_gradients(memory(), coefficient(**hyperparams), scaling)

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("scaling", *hyperparams)]
    factory.__signature__ = inspect.Signature(names)
    return Case(f"correct_gradients-{name}", factory, {"scaling": 1.0, **hyperparams}, **about)


def _corrections() -> Iterator[Case]:
    correct, constant, scheduled = agent_optax.correct_gradients, agent_optax.constant, agent_optax.scheduled
    losses, gradients = agent_optax.loss_regression, agent_optax.gradient_regression
    decay = optax.linear_schedule(0.75, 0.0, 2 * NUM_STEPS)
    static_schedule = {"static_args": ("schedule",)}
    snapshot, recursion, difference = agent_optax.snapshot, agent_optax.recursion, agent_optax.difference
    exact_difference = functools.partial(difference, exact=True)
    cached = functools.partial(snapshot, cached_batches=NUM_BATCHES)
    table = functools.partial(agent_optax.table, NUM_BATCHES)

    yield Case("correct_gradients", correct, {"scaling": 0.1}, **_SNAPSHOT)
    yield _correction("snapshot-loss_regression", snapshot, losses, {"smoothing": 0.3, "initial": 0.2}, **_SNAPSHOT)
    yield _correction("snapshot-gradient_regression", snapshot, gradients, {"decay": 0.9}, **_SNAPSHOT)
    yield _correction(
        "snapshot-gradient_regression_leaf", snapshot, functools.partial(gradients, scope="leaf"), {}, **_SNAPSHOT
    )
    yield _correction("snapshot-constant", snapshot, constant, {"c": 0.5}, **_SNAPSHOT)
    yield _correction("snapshot-scheduled", snapshot, scheduled, {"schedule": decay}, **_SNAPSHOT, **static_schedule)
    yield _correction("cached_snapshot-loss_regression", cached, losses, {"smoothing": 0.3, "initial": 0.2}, **_CACHED)
    yield _correction("cached_snapshot-gradient_regression", cached, gradients, {}, **_CACHED)
    yield _correction("recursion-scheduled", recursion, scheduled, {"schedule": decay}, **_OLD_GRADS, **static_schedule)
    yield _correction(
        "recursion-loss_regression", recursion, losses, {"decay": 0.9}, extra_args=("value", "old_value", "old_grads")
    )
    yield _correction("table-constant", table, constant, {"c": 1.0}, **_TABLE)
    yield _correction("table-gradient_regression", table, gradients, {}, **_TABLE)
    yield _correction("table-loss_regression", table, losses, {"decay": 0.9}, extra_args=("batch_index", "value"))
    yield _correction("difference-constant", difference, constant, {"c": 1.0})
    yield _correction("exact_difference-constant", exact_difference, constant, {"c": 1.0}, **_OLD_GRADS)
    yield Case(
        "correct_gradients-history",
        lambda scaling, decay: correct(agent_optax.history(decay), scaling=scaling),
        {"scaling": 1.0, "decay": 0.9},
    )
    yield _correction("history-loss_regression", agent_optax.history, losses, {"decay": 0.9}, extra_args=("value",))

    rate = {"learning_rate": LEARNING_RATE}
    yield Case("agent", agent_optax.agent, rate, **_SNAPSHOT)
    yield Case("svrg", agent_optax.svrg, {**rate, "momentum": 0.9}, **_SNAPSHOT)
    yield Case("alpha_svrg", agent_optax.alpha_svrg, {**rate, "num_refreshes": 5, "initial": 0.75}, **_SNAPSHOT)
    yield Case("storm", agent_optax.storm, {**rate, "a": 0.1}, **_OLD_GRADS)
    yield Case("mars", agent_optax.mars, {**rate, "weight_decay": 0.01})
    yield Case("mars-exact", agent_optax.mars, {**rate, "exact": True}, **_OLD_GRADS)
    yield Case("mars_correction", agent_optax.mars_correction, {"b1": 0.9, "gamma": 0.05})


# Sparse optimizers.


class Inner(NamedTuple):
    """An inner optimizer, and what `Case` must know about it."""

    factory: Callable[[Any], Any]  # learning_rate -> optimizer
    about: Mapping[str, Any] = {}


# Newton-Schulz multiplies a matrix by its transpose, which explicit sharding refuses if it is sharded.
_NEEDS_WHOLE_MATRICES = {"takes_sharded": False}


def _kernels(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _partitioned(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    parts = {"matrix": optax.sgd(learning_rate, momentum=0.9), "rest": optax.adam(learning_rate)}
    return optax.partition(parts, lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params))


def _saga() -> optax.GradientTransformationExtraArgs:
    memory = agent_optax.table(NUM_BATCHES)
    return agent_optax.correct_gradients(memory, agent_optax.gradient_regression(), scaling=1.0)


INNER = {
    "sgd": Inner(optax.sgd),
    "momentum": Inner(lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True)),
    "adam": Inner(optax.adam),
    "adamw": Inner(optax.adamw),
    "lion": Inner(optax.lion),
    "rmsprop": Inner(optax.rmsprop),
    "adagrad": Inner(optax.adagrad),
    "muon": Inner(optax.contrib.muon, _NEEDS_WHOLE_MATRICES),
    "adafactor": Inner(lambda lr: optax.adafactor(lr, min_dim_size_to_factor=4)),
    "schedule_free_sgd": Inner(optax.contrib.schedule_free_sgd),
    "schedule_free": Inner(lambda lr: optax.contrib.schedule_free(optax.adam(lr, b1=0.0), lr)),
    "multi_steps": Inner(lambda lr: optax.MultiSteps(optax.adam(lr), 2)),
    "inject_hyperparams": Inner(lambda lr: optax.inject_hyperparams(optax.sgd)(lr, momentum=0.9)),
    "partition": Inner(_partitioned),
    "masked": Inner(lambda lr: optax.chain(optax.masked(optax.trace(0.9), _kernels), optax.scale_by_learning_rate(lr))),
    "agent": Inner(agent_optax.agent, _SNAPSHOT),
    "svrg": Inner(agent_optax.svrg, _SNAPSHOT),
    "storm": Inner(agent_optax.storm, _OLD_GRADS),
    "mars": Inner(agent_optax.mars),
    "saga": Inner(lambda lr: optax.chain(_saga(), optax.sgd(lr)), _TABLE),
    "history": Inner(
        lambda lr: optax.chain(agent_optax.correct_gradients(agent_optax.history(), scaling=1.0), optax.sgd(lr))
    ),
    "gradient_regression": Inner(
        lambda lr: optax.chain(
            agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0), optax.sgd(lr)
        ),
        _SNAPSHOT,
    ),
}

TOPOLOGIES = {
    "static": lambda drop_fraction: agent_optax.static(),
    "set_": lambda drop_fraction: agent_optax.set_(UPDATE_EVERY, drop_fraction),
    "rigl": lambda drop_fraction: agent_optax.rigl(UPDATE_EVERY, drop_fraction),
    "set_itop": lambda drop_fraction: agent_optax.set_itop(NUM_STEPS, UPDATE_EVERY),
    "rigl_itop": lambda drop_fraction: agent_optax.rigl_itop(NUM_STEPS, UPDATE_EVERY),
    "snfs": lambda drop_fraction: agent_optax.snfs(UPDATE_EVERY, drop_fraction),
    "drop_and_grow": lambda drop_fraction: agent_optax.drop_and_grow(
        agent_optax.taylor,
        agent_optax.momentum_magnitude,
        update_every=UPDATE_EVERY,
        drop_fraction=drop_fraction,
        momentum=0.9,
    ),
    "gradual_pruning": lambda drop_fraction: agent_optax.gradual_pruning(NUM_STEPS, UPDATE_EVERY),
    "granet": lambda drop_fraction: agent_optax.gradual_pruning(
        NUM_STEPS, UPDATE_EVERY, drop_fraction=drop_fraction, scope="global"
    ),
    "fisher": lambda drop_fraction: agent_optax.drop_and_grow(
        agent_optax.fisher(), update_every=UPDATE_EVERY, drop_fraction=drop_fraction
    ),
    "normalized-movement": lambda drop_fraction: agent_optax.gradual_pruning(
        NUM_STEPS,
        UPDATE_EVERY,
        drop_fraction=drop_fraction,
        scope="global",
        score=agent_optax.normalized(agent_optax.movement()),
    ),
    "ac_dc": lambda drop_fraction: agent_optax.ac_dc(range(1, NUM_STEPS)),
    "straight_through": lambda drop_fraction: agent_optax.straight_through(decay=0.01),
    "bayesian_rewiring": lambda drop_fraction: agent_optax.bayesian_rewiring(LEARNING_RATE, steps_per_epoch=NUM_STEPS),
}


class Product(NamedTuple):
    """`sparsify(inner, topology, **options)` for each of these."""

    name: str
    options: Mapping[str, Any]
    topologies: tuple[str, ...]
    inner: tuple[str, ...]


COMPACT = {"storage": "compact"}
NOT_COMPACT = ("muon", "adafactor")  # they work on whole matrices
STATIC_ONLY = ("multi_steps",)  # a topology would see micro-batches

PRODUCTS = [
    Product("sparsify", {}, ("rigl",), tuple(n for n in INNER if n not in STATIC_ONLY)),
    Product("sparsify", {}, ("static",), STATIC_ONLY),
    # What the inner optimizer does to its state is one matter, how weights are chosen another.
    Product("sparsify", {}, ("static", "set_"), ("momentum", "adam", "agent")),
    Product("sparsify", {}, ("set_itop", "rigl_itop"), ("momentum",)),
    Product("sparsify-compact", COMPACT, ("rigl",), tuple(n for n in INNER if n not in (*NOT_COMPACT, *STATIC_ONLY))),
    Product("sparsify-compact", COMPACT, ("static",), STATIC_ONLY),
    Product("sparsify-compact", COMPACT, ("static", "set_"), ("momentum", "agent")),
    Product(
        "sparsify",
        {},
        ("snfs", "drop_and_grow", "gradual_pruning", "granet", "bayesian_rewiring"),
        ("momentum", "agent"),
    ),
    Product("sparsify", {}, ("fisher", "normalized-movement"), ("momentum",)),
    Product("sparsify", {}, ("ac_dc",), ("momentum",)),
    Product("sparsify", {}, ("straight_through",), ("momentum", "agent", "storm", "schedule_free")),
    Product("sparsify", {}, ("bayesian_rewiring",), ("adam", "storm", "saga")),
    Product("sparsify-compact", COMPACT, ("drop_and_grow", "fisher"), ("momentum",)),
    Product(
        "sparsify-n_m",
        {"pattern": agent_optax.n_m(2, 4)},
        ("static", "rigl", "granet", "ac_dc", "straight_through"),
        ("momentum",),
    ),
    Product("sparsify-blocks", {"pattern": agent_optax.blocks((2, 3))}, ("set_", "rigl", "snfs"), ("momentum",)),
    Product("sparsify-channels", {"pattern": agent_optax.output_channels()}, ("rigl",), ("momentum",)),
    Product("sparsify-compact-n_m", {**COMPACT, "pattern": agent_optax.n_m(2, 4)}, ("set_",), ("momentum",)),
    Product("sparsify-compact-fan_in", {**COMPACT, "pattern": agent_optax.fan_in(group=4)}, ("rigl",), ("momentum",)),
    Product("sparsify-ablation", {"pattern": agent_optax.fan_in(ablation=0.5)}, ("rigl",), ("momentum",)),
    Product("sparsify-corrected_growth", {"grow_by": "corrected"}, ("rigl",), ("agent", "history")),
]


def _sparse_case(product: Product, topology_name: str, inner_name: str) -> Case:
    inner, topology = INNER[inner_name], TOPOLOGIES[topology_name]

    def factory(learning_rate: Any, sparsity: Any, drop_fraction: Any, key: Any) -> Any:
        optimizer = inner.factory(learning_rate)
        return agent_optax.sparsify(optimizer, topology(drop_fraction), sparsity=sparsity, key=key, **product.options)

    return Case(
        f"{product.name}-{topology_name}-{inner_name}",
        factory,
        {"learning_rate": LEARNING_RATE, "sparsity": 0.5, "drop_fraction": 0.5, "key": 0},
        static_args=("sparsity", "key"),
        **inner.about,
    )


def _accumulating(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def accumulating(**hyperparams: Any) -> optax.GradientTransformationExtraArgs:
        return optax.MultiSteps(factory(**hyperparams), 2).gradient_transformation()

    return accumulating


def _sparse() -> Iterator[Case]:
    for product in PRODUCTS:
        for topology, inner in itertools.product(product.topologies, product.inner):
            yield _sparse_case(product, topology, inner)
    for topology in ("static", "set_", "rigl"):
        inside = _sparse_case(PRODUCTS[0], topology, "momentum")
        yield inside._replace(name=f"multi_steps-of-{inside.name}", factory=_accumulating(inside.factory))


CASES: dict[str, Case] = {case.name: case for case in (*_corrections(), *_sparse())}

# Checks of what happens outside an optimizer do not depend on its parts together: they take one case for each memory,
# alias and topology, and not the products with coefficients and inner optimizers.
TYPICAL_CASES: dict[str, Case] = {
    name: CASES[name]
    for name in (
        "correct_gradients",
        "correct_gradients-snapshot-gradient_regression_leaf",
        "correct_gradients-cached_snapshot-loss_regression",
        "correct_gradients-recursion-loss_regression",
        "correct_gradients-table-gradient_regression",
        "correct_gradients-exact_difference-constant",
        "correct_gradients-history",
        "agent",
        "alpha_svrg",
        "storm",
        "mars",
        *(f"sparsify-{topology}-{inner}" for topology in ("static", "set_", "rigl") for inner in ("momentum", "agent")),
        "sparsify-rigl-saga",
        "sparsify-snfs-momentum",
        "sparsify-granet-momentum",
        "sparsify-normalized-movement-momentum",
        "sparsify-straight_through-agent",
        "sparsify-bayesian_rewiring-agent",
        "sparsify-n_m-rigl-momentum",
        "sparsify-blocks-rigl-momentum",
        "sparsify-compact-rigl-momentum",
        "sparsify-compact-rigl-agent",
        "sparsify-corrected_growth-rigl-agent",
        "multi_steps-of-sparsify-rigl-momentum",
    )
}

# What compiles a program for each wrapper around an optimizer takes one of each kind of state and of update; the other
# typical cases are traced in the same wrappers.
REPRESENTATIVE_CASES: dict[str, Case] = {
    name: TYPICAL_CASES[name]
    for name in (
        "correct_gradients",
        "correct_gradients-table-gradient_regression",
        "storm",
        "mars",
        "sparsify-rigl-agent",
        "sparsify-snfs-momentum",
        "sparsify-bayesian_rewiring-agent",
        "sparsify-compact-rigl-agent",
        "multi_steps-of-sparsify-rigl-momentum",
    )
}


def all_but(cases: Mapping[str, Case], others: Mapping[str, Case]) -> dict[str, Case]:
    """Those of `cases` that are not among `others`."""
    return {name: case for name, case in cases.items() if name not in others}
