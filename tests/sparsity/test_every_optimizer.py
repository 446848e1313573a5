"""Every optimizer of Optax, made sparse, gives the numbers of the plain optimizer on the active entries alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import agent_optax

SHAPE, NUM_ACTIVE = (6, 5), 12
NUM_STEPS, UPDATE_EVERY, DROP = 7, 3, 0.3
RATE = 0.05


class Inner(NamedTuple):
    """An optimizer, and what is special about it."""

    make: Callable[[], Any]
    needs: tuple[str, ...] = ()  # extra arguments of its update
    refused: str = ""  # by compact storage, with these words
    is_entrywise: bool = True  # else it sees the kernel as a matrix, and the plain optimizer is given zeros
    resets: bool = True  # whether arrays of the kernel's shape hold an entry for each weight


def _at_rate(factory: Callable[..., Any], **options: Any) -> Inner:
    return Inner(lambda: factory(RATE, **options))


def _on_matrices(inner: Inner, refused: str, **about: Any) -> Inner:
    return inner._replace(refused=refused, is_entrywise=False, **about)


EVERY: Mapping[str, Inner] = {
    "adabelief": _at_rate(optax.adabelief),
    "adadelta": _at_rate(optax.adadelta),
    "adafactor": _on_matrices(_at_rate(optax.adafactor, momentum=0.9), "reduce_sum to which inactive weights"),
    "adagrad": _at_rate(optax.adagrad),
    "adam": _at_rate(optax.adam),
    "adamax": _at_rate(optax.adamax),
    "adamaxw": _at_rate(optax.adamaxw),
    "adamw": _at_rate(optax.adamw, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    "adan": _at_rate(optax.adan),
    "amsgrad": _at_rate(optax.amsgrad),
    "fromage": _at_rate(optax.fromage)._replace(refused="reduce_sum to which inactive weights"),
    "lamb": _at_rate(optax.lamb, weight_decay=0.1)._replace(refused="reduce_sum to which inactive weights"),
    "lars": _at_rate(optax.lars, weight_decay=0.1)._replace(refused="reduce_sum to which inactive weights"),
    "lbfgs": _on_matrices(
        Inner(lambda: optax.lbfgs(memory_size=3), needs=("value", "grad", "value_fn")), "the function value_fn="
    ),
    "lion": _at_rate(optax.lion),
    "nadam": _at_rate(optax.nadam),
    "nadamw": _at_rate(optax.nadamw),
    "noisy_sgd": _on_matrices(_at_rate(optax.noisy_sgd, key=0), "numbers that differ from entry to entry"),
    "novograd": _at_rate(optax.novograd),
    "optimistic_adam_v2": _at_rate(optax.optimistic_adam_v2),
    "optimistic_gradient_descent": _at_rate(optax.optimistic_gradient_descent),
    "polyak_sgd": Inner(lambda: optax.polyak_sgd(0.1), needs=("value",)),
    "radam": _at_rate(optax.radam),
    "rmsprop": _at_rate(optax.rmsprop, momentum=0.9, initial_scale=0.5),
    "rprop": _at_rate(optax.rprop),
    "sgd": _at_rate(optax.sgd, momentum=0.9, nesterov=True),
    "sign_sgd": _at_rate(optax.sign_sgd),
    "signum": _at_rate(optax.signum),
    "sm3": _on_matrices(_at_rate(optax.sm3), "reduce_max"),
    "yogi": _at_rate(optax.yogi),
    "acprop": _at_rate(contrib.acprop),
    "ademamix": _at_rate(contrib.ademamix),
    "simplified_ademamix": _at_rate(contrib.simplified_ademamix),
    "adopt": _at_rate(contrib.adopt),
    "cocob": Inner(contrib.cocob),
    "dadapt_adamw": Inner(contrib.dadapt_adamw),
    "dog": Inner(lambda: contrib.dog(1.0)),
    "dowg": Inner(lambda: contrib.dowg(1.0)),
    "galore": _on_matrices(_at_rate(contrib.galore, rank=5), "dot_general", resets=False),
    "madgrad": _at_rate(contrib.madgrad),
    "mechanize": Inner(lambda: contrib.mechanize(optax.sgd(0.1))),
    "momo": Inner(lambda: contrib.momo(0.1), needs=("value",)),
    "momo_adam": Inner(lambda: contrib.momo_adam(0.1), needs=("value",)),
    "muon": _on_matrices(_at_rate(contrib.muon), "dot_general"),
    "prodigy": Inner(lambda: contrib.prodigy(0.1)),
    "sam": Inner(
        lambda: contrib.sam(optax.sgd(RATE), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2)
    ),
    "schedule_free": Inner(lambda: contrib.schedule_free(optax.adam(RATE, b1=0.0), RATE)),
    "schedule_free_sgd": _at_rate(contrib.schedule_free_sgd),
    "schedule_free_adamw": _at_rate(contrib.schedule_free_adamw),
    "sophia": _on_matrices(Inner(lambda: contrib.sophia(RATE), needs=("obj_fn",)), "the function obj_fn="),
}


def objective(params: Any) -> jax.Array:
    return jnp.sum(jnp.log(jnp.cosh(params["kernel"] - 0.3))) + jnp.sum(params["bias"] ** 2)


def start() -> tuple[dict[str, jax.Array], np.ndarray]:
    """Parameters and start mask."""
    kernel = jax.random.normal(jax.random.key(0), SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask.flat[np.random.default_rng(1).choice(mask.size, NUM_ACTIVE, replace=False)] = True
    return {"kernel": jnp.where(mask, kernel, 0), "bias": jnp.linspace(-1, 1, 5)}, mask


def gradient(step: int, mask: np.ndarray, factor: float) -> dict[str, np.ndarray]:
    """Random; where a weight is inactive, multiplied by `factor`."""
    rng = np.random.default_rng([2, step])
    kernel = rng.normal(size=SHAPE).astype(np.float32)
    return {
        "kernel": np.where(mask, kernel, np.float32(factor) * kernel),
        "bias": rng.normal(size=5).astype(np.float32),
    }


def extra_args(inner: Inner, step: int, grads: Any) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Arrays and functions."""
    available = {"value": np.float32(3.0 - 0.2 * step), "grad": grads, "value_fn": objective, "obj_fn": objective}
    functions = tuple((name, objective) for name in inner.needs if name.endswith("_fn"))
    return {name: available[name] for name in inner.needs if not name.endswith("_fn")}, functions


def rewired(kernel: np.ndarray, mask: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """RigL by sorting: the smallest active weights make room for the largest gradients elsewhere."""
    num_dropped = int(np.ceil(np.float32(DROP) * mask.sum()))
    order = np.argsort(np.where(mask, np.abs(kernel), np.inf).ravel(), kind="stable")
    mask = mask.copy()
    mask.flat[order[:num_dropped]] = False
    order = np.argsort(np.where(mask, np.inf, -np.abs(grad)).ravel(), kind="stable")
    mask.flat[order[:num_dropped]] = True
    return mask


@functools.cache
def run_plain(name: str, topology: str, factor: float) -> tuple[list[np.ndarray], int]:
    """The kernel after each step of the plain optimizer: on the active entries alone, or on the matrix with zeros.

    And the number of traces: SAM's state changes its type once.
    """
    inner = EVERY[name]
    tx = optax.with_extra_args_support(inner.make())
    params, mask = start()

    def seen(tree: Any) -> Any:
        kernel = np.asarray(tree["kernel"])
        return {**tree, "kernel": kernel[mask][None] if inner.is_entrywise else np.where(mask, kernel, 0)}

    state = tx.init(seen(params))
    kernels, traces = [], []

    @functools.partial(jax.jit, static_argnums=4)
    def update(grads: Any, state: Any, params: Any, args: Any, functions: Any) -> Any:
        traces.append(1)
        return tx.update(grads, state, params, **args, **dict(functions))

    for step in range(1, NUM_STEPS + 1):
        grads = gradient(step, mask, factor)
        args, functions = extra_args(inner, step, seen(grads))
        updates, state = update(seen(grads), state, seen(params), args, functions)
        moved = optax.apply_updates(seen(params), updates)
        kernel = np.zeros(SHAPE, np.float32)
        kernel[mask] = np.ravel(moved["kernel"]) if inner.is_entrywise else np.asarray(moved["kernel"])[mask]
        if topology == "rigl" and step % UPDATE_EVERY == 0:
            old, mask = mask, rewired(kernel, mask, grads["kernel"])
            kernel = np.where(old & mask, kernel, 0)
            state = _restarted(tx, inner, state, seen({**moved, "kernel": kernel}), old, mask)
        params = {**moved, "kernel": kernel}
        kernels.append(kernel)
    return kernels, len(traces)


def _restarted(tx: Any, inner: Inner, state: Any, params: Any, old: np.ndarray, new: np.ndarray) -> Any:
    """The state after a change of masks: as it was where a weight stays, initial where it is new."""
    shape = (1, NUM_ACTIVE) if inner.is_entrywise else SHAPE

    def restart(array: jax.Array, fresh: jax.Array) -> jax.Array:
        if array.shape[-2:] != shape or not inner.resets:
            return array
        whole = np.zeros((*array.shape[:-2], *SHAPE), array.dtype)
        whole[..., old] = array[..., 0, :] if inner.is_entrywise else array[..., old]
        kept = whole[..., new][..., None, :] if inner.is_entrywise else whole
        survives = (old & new)[new][None] if inner.is_entrywise else old & new
        return jnp.where(survives, kept, fresh)

    return jax.tree.map(restart, state, tx.init(params))


def run_sparse(
    inner: Inner, topology: str, storage: str, factors: tuple[float, ...]
) -> tuple[list[list[np.ndarray]], int]:
    """The kernels after each step, for each factor, with one program for all of them; and the number of traces."""
    params, mask = start()
    chosen = agent_optax.rigl(UPDATE_EVERY, DROP) if topology == "rigl" else agent_optax.static()
    tx = agent_optax.sparsify(inner.make(), chosen, masks={"kernel": mask, "bias": None}, storage=storage)
    traces = []

    def step(params: Any, opt_state: Any, grads: Any, args: Any, functions: Any) -> Any:
        traces.append(1)
        updates, opt_state = tx.update(grads, opt_state, params, **args, **dict(functions))
        return optax.apply_updates(params, updates), opt_state

    step = conformance.jit(step, static_argnums=4)
    runs = []
    for factor in factors:
        p, opt_state, kernels = params, conformance.jit(tx.init)(params), []
        for number in range(1, NUM_STEPS + 1):
            active = np.asarray(agent_optax.active_masks(opt_state, p)["kernel"])
            grads = gradient(number, active, factor)
            args, functions = extra_args(inner, number, grads)
            p, opt_state = step(p, opt_state, grads, args, functions)
            kernels.append(np.asarray(p["kernel"]))
            assert not p["kernel"][~np.asarray(agent_optax.active_masks(opt_state, p)["kernel"])].any()
        runs.append(kernels)
    return runs, len(traces)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("topology", ["static", "rigl"])
@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_it_is_the_plain_optimizer_on_active_entries(storage: str, topology: str, name: str) -> None:
    inner = EVERY[name]
    if storage == "compact" and inner.refused:
        with pytest.raises(ValueError, match=inner.refused):
            run_sparse(inner, topology, storage, (10.0,))
        return
    # Inactive gradients are larger than all others, so that their size has no part in what grows.
    (kernels, blown_up), num_traces = run_sparse(inner, topology, storage, (10.0, 1e4))
    np.testing.assert_array_equal(kernels, blown_up)
    plain, num_plain_traces = run_plain(name, topology, 10.0)
    np.testing.assert_allclose(kernels, plain, rtol=2e-4, atol=2e-6)
    assert num_traces == num_plain_traces


def test_no_optimizer_is_missing() -> None:
    """Whatever Optax calls by its learning rate is an optimizer."""
    others = {"dpsgd", "optimistic_adam"}  # takes gradients of single examples; deprecated
    for module in (optax, contrib):
        for name, factory in vars(module).items():
            if name.startswith("_") or inspect.ismodule(factory) or not inspect.isfunction(factory):
                continue
            parameters = list(inspect.signature(factory).parameters)
            is_optimizer = "learning_rate" in parameters[:1] and not name.startswith("scale_by")
            assert not is_optimizer or name in EVERY or name in others, name
