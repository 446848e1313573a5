"""Training runs: one method in one setting, compiled once, seed by seed."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agent_optax
from agent_optax import adversarial, analysis, layers
from convergence import images, network
from convergence.methods import METHODS, Method
from convergence.setting import Setting

AVERAGE_DECAY = 0.99  # of the weight average, a step
REFRESH_BATCH = 1000  # images at once in a refresh pass that needs no gradient of a single batch
ROBUST_IMAGES, ROBUST_STEPS = 1000, 20  # of the attack that evaluates
PERTURBATION = 0.1  # relative to the weights of a layer
PROBES = (  # of gradients batch by batch, active weights only, with the snapshot of the beginning of the epoch
    "true_correlation",  # of gradients at the parameters and at the snapshot
    "best_coefficient",  # c* of equation (3)
    "loss_coefficient",  # c^ of equation (4)
    "best_variance_ratio",  # variance left at c*, of 1
    "loss_variance_ratio",  # variance left at c^
    "gradient_variance",  # at the parameters
    "gradient_norm",  # of the mean gradient
    "perturbed_correlation",  # of gradients at the parameters and at perturbed ones, as in the paper's Figure 1
)
QUICK = {"xla_backend_optimization_level": 0}  # to compile what runs once a seed


class Run(NamedTuple):
    """One seed, by epoch [E]."""

    accuracy: np.ndarray  # on the test set, in percent
    average_accuracy: np.ndarray  # of the weight average; nan where there is none, and in the first half
    correlation: np.ndarray  # c before scaling, mean over the epoch; nan without correction
    variance_ratio: np.ndarray  # the coefficient's own estimate, mean over the epoch; nan where there is none
    evaluations: np.ndarray  # gradient evaluations so far, in units of the training set
    seconds: np.ndarray  # of processor time so far, training alone: no compilation, no test
    robust_accuracy: float  # under attack, after the last epoch; nan in standard training
    probes: np.ndarray | None = None  # [E, P], the PROBES at the end of each epoch; None where not asked for


class Programs(NamedTuple):
    """What is compiled for one method in one setting."""

    steps: Any  # half an epoch
    refresh: Any  # None without a snapshot
    rewire: Any  # a topology update of sparse layers; None where the optimizer does it, or nothing does
    probe: Any  # None where nothing is measured


class State(NamedTuple):
    """What training changes."""

    params: Any
    connections: Any  # of sparse layers; None for dense kernels
    opt_state: optax.OptState
    average: Any  # None where there is none


def train(name: str, setting: Setting, seeds: tuple[int, ...]) -> list[Run]:
    """Trains the method of this name from each seed."""
    method = METHODS[name]
    setting = method.own(setting)
    programs = _compiled(name, setting)
    return [_train_seed(method, setting, programs, seed) for seed in seeds]


def attack_of(setting: Setting, num_steps: int) -> adversarial.Attack:
    """PGD within the ball of the setting, on standardised pixels."""
    data = setting.images
    epsilon = setting.attack_epsilon / data.pixel_deviation
    return adversarial.pgd(
        adversarial.cross_entropy(network.logits),
        epsilon=epsilon,
        step_size=2.5 * epsilon / num_steps,
        num_steps=num_steps,
        bounds=tuple((pixel - data.pixel_mean) / data.pixel_deviation for pixel in (0.0, 1.0)),
    )


@functools.cache
def _on_device(*subset: Any) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.asarray, images.load(*subset)[:4]))


@functools.cache
def _sparse_start(setting: Setting, pattern: Any, seed: int) -> tuple[Any, Any, jax.Array]:
    """Parameters and masks, the same for all methods of a pattern, and the key of the topology."""
    return _compiled_start(setting, pattern)(jax.random.key(seed))


@functools.cache
def _compiled_start(setting: Setting, pattern: Any) -> Any:
    num_inputs = setting.images.train_images.shape[1]

    def start(key: jax.Array) -> tuple[Any, Any, jax.Array]:
        params_key, topology_key = jax.random.split(key)
        params = network.init_params(params_key, num_inputs, setting.hidden)
        if setting.topology == "dense":
            return params, None, topology_key
        opt_state = setting.sparsified(optax.identity(), topology_key, pattern=pattern).init(params)
        masks = agent_optax.active_masks(opt_state, params)
        return network.sparse_start(params, masks), masks, topology_key

    return jax.jit(start).lower(jax.random.key(0)).compile(compiler_options=QUICK)


@functools.cache
def _compiled_layers_start(setting: Setting, group: int) -> Any:
    num_inputs = setting.images.train_images.shape[1]

    def start(key: jax.Array) -> tuple[Any, Any]:
        return network.sparse_layers_start(key, num_inputs, setting.hidden, setting.sparsity, group)

    return jax.jit(start).lower(jax.random.key(0)).compile(compiler_options=QUICK)


def _start(method: Method, setting: Setting, seed: int) -> State:
    if method.group is not None:
        params, connections = _compiled_layers_start(setting, method.group)(jax.random.key(seed))
        opt_state = method.inner(setting).init(params)
        return State(params, layers.prepare_rewiring(params, connections, opt_state), opt_state, average=None)
    params, masks, key = _sparse_start(setting, method.pattern, seed)
    average = jax.tree.map(jnp.copy, params) if setting.averages else None
    return State(jax.tree.map(jnp.copy, params), None, method.optimizer(setting, key, masks).init(params), average)


@functools.cache
def _compiled(name: str, setting: Setting) -> Programs:
    method = METHODS[name]
    data = _on_device(*setting.subset)[:2]
    attack = attack_of(setting, setting.attack_steps) if setting.attack_epsilon else None
    grads_fn = agent_optax.value_and_grads(network.loss_fn)

    start = _start(method, setting, seed=0)
    # Key and masks matter to the start alone: the state carries them on.
    tx = method.optimizer(setting, key=0) if method.group is None else method.inner(setting)
    tx = optax.with_extra_args_support(tx)

    def step(data: Any, carry: State, inputs: Any) -> tuple[State, jax.Array]:
        params, connections, opt_state, average = carry
        indices, batch_index, key = inputs
        batch = data[0][indices], data[1][indices]
        if attack is not None:
            batch = jax.lax.stop_gradient(attack(params, *batch, key)), batch[1]
        (_, grads), extras = grads_fn(params, opt_state, batch, connections)
        updates, opt_state = tx.update(grads, opt_state, params, batch_index=batch_index, **extras)
        params = optax.apply_updates(params, updates)
        if average is not None:
            average = optax.incremental_update(params, average, 1 - AVERAGE_DECAY)
        return State(params, connections, opt_state, average), _measured(opt_state)

    def steps(state: State, inputs: Any, data: Any) -> tuple[State, jax.Array]:
        return jax.lax.scan(functools.partial(step, data), state, inputs)

    def refresh(state: State, indices: jax.Array, key: jax.Array, data: Any) -> Any:
        batches = data[0][indices], data[1][indices]
        if method.attacks_refresh:
            keys = jax.random.split(key, len(indices))
            attacked = jax.lax.map(lambda batch: attack(state.params, *batch), (*batches, keys))
            batches = attacked, batches[1]
        args = () if state.connections is None else (state.connections,)
        return agent_optax.refresh(network.loss_fn, state.params, state.opt_state, batches, args=args)

    rewire = None
    if method.group is not None and setting.topology not in ("static", "dense"):
        topology = setting.topology_updates()

        def rewire(state: State, indices: jax.Array, step: int, key: jax.Array, data: Any) -> State:
            batch = data[0][indices], data[1][indices]
            params, connections, opt_state, _, _ = layers.rewire(
                network.loss_fn,
                *state[:3],
                batch,
                tx=tx,
                topology=topology,
                step=step,
                key=key,
                candidates=method.candidates,
            )
            return State(params, connections, opt_state, state.average)

    order = _Order(method, setting, seed=0)
    compiled_steps = jax.jit(steps, donate_argnums=0).lower(start, order.half(0), data).compile()
    compiled_refresh = None
    if method.refresh_at:
        lowered = jax.jit(refresh).lower(start, order.refresh_batches(), jax.random.key(0), data)
        compiled_refresh = lowered.compile()
    if rewire is not None:
        rewire(start, order.batches[0], 1, jax.random.key(0), data)  # compiles
    probe = functools.partial(_probe, data=data) if setting.probes else None
    return Programs(compiled_steps, compiled_refresh, rewire, probe)


@jax.jit
def _probe(params: Any, opt_state: Any, indices: jax.Array, key: jax.Array, data: Any) -> jax.Array:
    batches = data[0][indices], data[1][indices]
    masks = agent_optax.active_masks(opt_state, params)
    old_params = agent_optax.snapshot_params(opt_state, params)
    best = analysis.optimal_coefficient(network.loss_fn, params, old_params, batches, masks=masks)
    gradients = analysis.gradient_correlation(network.loss_fn, params, old_params, batches, masks=masks)
    nearby = analysis.perturb(params, PERTURBATION, key, masks)
    perturbed = analysis.gradient_correlation(network.loss_fn, params, nearby, batches, masks=masks)
    norms = analysis.gradient_norms(network.loss_fn, params, batches, masks=masks)
    return jnp.stack(
        [
            gradients.correlation,
            best.optimal,
            best.loss_estimate,
            best.optimal_variance_ratio,
            best.loss_estimate_variance_ratio,
            gradients.variance,
            norms.full_norm,
            perturbed.correlation,
        ]
    )


def _measured(opt_state: optax.OptState) -> jax.Array:
    try:
        report = agent_optax.diagnostics(opt_state)
    except ValueError:  # an optimizer that neither corrects nor prunes
        report = {}
    return jnp.stack([report.get(name, jnp.nan) for name in ("correlation", "variance_ratio")])


class _Order:
    """In which order a seed visits the images: the same for all methods whose batches are as large."""

    def __init__(self, method: Method, setting: Setting, seed: int):
        self.method, self.seed = method, seed
        self.num_images = len(setting.images.train_images)
        self.batch_shape = (setting.steps_an_epoch, setting.batch_size)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.rng = np.random.default_rng((self.seed, epoch))
        parts = [self._shuffled() for _ in range(self.method.batch_multiple)]
        self.batch_index = np.arange(len(parts[0]))
        if self.method.fixes_batches:
            if not self.method.keeps_order:
                self.batch_index = self.rng.permutation(self.batch_index)
            parts = [_Order._fixed(self.num_images, self.seed, self.batch_shape)[self.batch_index]]
        self.batches = np.concatenate(parts, axis=1).astype(np.int32)
        self.keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), epoch), len(self.batches))

    def _shuffled(self) -> np.ndarray:
        return self.rng.permutation(self.num_images)[: np.prod(self.batch_shape)].reshape(self.batch_shape)

    @staticmethod
    def _fixed(num_images: int, seed: int, shape: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(seed).permutation(num_images)[: np.prod(shape)].reshape(shape)

    def half(self, which: int) -> tuple[Any, ...]:
        """Images [S, B], batch indices [S] and keys [S] of the steps of a half epoch."""
        half = len(self.batches) // 2
        part = slice(which * half, (which + 1) * half)
        return self.batches[part], self.batch_index[part].astype(np.int32), self.keys[part]

    def refresh_batches(self) -> np.ndarray:
        """The images of a refresh pass; batch by batch where single batches matter."""
        if self.method.keeps_batches or self.method.pairs_losses:
            if self.method.fixes_batches:
                return _Order._fixed(self.num_images, self.seed, self.batch_shape).astype(np.int32)
            return self.batches
        num_images = round(self.method.refresh_share * self.num_images)
        num_batches = max(num_images // REFRESH_BATCH, 1)
        chosen = self.rng.permutation(self.num_images)[: num_images // num_batches * num_batches]
        return chosen.reshape(num_batches, -1).astype(np.int32)


def _train_seed(method: Method, setting: Setting, programs: Programs, seed: int) -> Run:
    data = _on_device(*setting.subset)[:2]
    test_set = setting.images[2:4]
    state = _start(method, setting, seed)
    order = _Order(method, setting, seed)
    rows, probes, evaluations, seconds, ratio = [], [], 0.0, 0.0, np.inf
    for epoch in range(setting.epochs * method.epoch_multiple):
        order.start_epoch(epoch)
        measured = []
        for half in (0, 1):
            batches = order.refresh_batches() if method.refresh_at else None
            start = time.process_time()
            if half in method.refresh_at and epoch % method.refresh_every == 0 and ratio > method.refresh_above:
                state = state._replace(opt_state=programs.refresh(state, batches, order.keys[half], data))
                evaluations += method.refresh_gradients(setting)
            state, values = programs.steps(state, order.half(half), data)
            measured.append(np.asarray(values))
            if half == 0 and programs.rewire is not None:
                num_steps = epoch * len(order.batches) + len(order.batches) // 2
                state = programs.rewire(state, order.half(half)[0][-1], num_steps, order.keys[0], data)
                jax.block_until_ready(state)
            seconds += time.process_time() - start
            evaluations += method.step_evaluations(setting) / 2
            ratio = measured[-1][-20:, 1].mean() if method.refresh_above > 0 else np.inf
        if (epoch + 1) % method.epoch_multiple:
            continue
        params, connections, opt_state, average = state
        average_accuracy = np.nan
        if average is not None and epoch >= setting.epochs * method.epoch_multiple // 2:
            if setting.topology != "dense":  # an average holds weights that were dropped, too
                average = agent_optax.mask_params(average, opt_state)
            average_accuracy = network.accuracy(average, *test_set)
        correlation, variance_ratio = np.concatenate(measured).mean(axis=0)
        accuracy = network.accuracy(network.to_dense(params, connections), *test_set)
        if programs.probe is not None:
            probes.append(np.asarray(programs.probe(params, opt_state, order.batches, order.keys[0])))
        rows.append((accuracy, average_accuracy, correlation, variance_ratio, evaluations, seconds))
    robust = _robust_accuracy(setting, state.params, seed) if setting.attack_epsilon else np.nan
    return Run(*np.array(rows).T, robust_accuracy=robust, probes=np.stack(probes) if probes else None)


@functools.cache
def _compiled_robust_accuracy(setting: Setting) -> Any:
    attack = attack_of(setting, ROBUST_STEPS)
    return jax.jit(functools.partial(adversarial.robust_accuracy, network.logits, attack=attack, restarts=1))


def _robust_accuracy(setting: Setting, params: Any, seed: int) -> float:
    test_images, test_labels = (array[:ROBUST_IMAGES] for array in _on_device(*setting.subset)[2:])
    return 100 * float(_compiled_robust_accuracy(setting)(params, test_images, test_labels, key=seed))
