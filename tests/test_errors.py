"""Bad input gets an error that quotes the value and names the fix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax
from agent_optax import (
    constant,
    correct_gradients,
    gradient_regression,
    history,
    loss_regression,
    refresh,
    rigl,
    set_,
    sparsify,
    static,
)

PARAMS = {"dense": {"bias": jnp.ones(4), "kernel": jnp.ones((4, 4))}}
AGENT = agent_optax.agent(0.1)


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.sum(params["dense"]["kernel"] * batch)


def sparse(**arguments: Any) -> optax.OptState:
    arguments = {"sparsity": 0.5, **arguments}
    inner, topology = arguments.pop("inner", optax.sgd(0.1)), arguments.pop("topology", rigl())
    return sparsify(inner, topology, **arguments).init(PARAMS)


def update(tx: Any, *args: Any, **kwargs: Any) -> Any:
    return tx.update(PARAMS, tx.init(PARAMS), *args, **kwargs)


def tree(kernel: Any, bias: Any = None) -> Any:
    return {"dense": {"bias": bias, "kernel": kernel}}


def refreshed(batches: Any, tx: Any = AGENT) -> Any:
    return refresh(loss, PARAMS, tx.init(PARAMS), batches)


BATCH = jnp.ones((4, 4))
IS_A_SHARE = "it is the share of inactive weights, such as 0.9"

# What is done wrong, the error, and what the message says: the value, and the fix.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # topologies
    "score": (lambda: agent_optax.drop_and_grow(drop="magnitude"), TypeError, ("weight_magnitude", "'magnitude'")),
    "statistic": (lambda: agent_optax.drop_and_grow(redistribute=0.9), TypeError, ("redistribute", "0.9")),
    "decay of momentum": (lambda: agent_optax.snfs(momentum=1.0), ValueError, ("[0, 1), got 1.0", "such as 0.9")),
    "no momentum": (
        lambda: update(
            sparsify(optax.sgd(0.1), agent_optax.drop_and_grow(grow=agent_optax.momentum_magnitude), sparsity=0.5),
            PARAMS,
        ),
        ValueError,
        ("keeps none", "momentum=0.9"),
    ),
    "pruning without end": (lambda: agent_optax.gradual_pruning(stop=100), ValueError, ("start=100, stop=100",)),
    "initial sparsity": (
        lambda: agent_optax.gradual_pruning(stop=500, initial_sparsity=1.0),
        ValueError,
        ("initial_sparsity must lie in [0, 1), got 1.0",),
    ),
    "scope of pruning": (
        lambda: agent_optax.gradual_pruning(stop=500, scope="all"),
        ValueError,
        ("'layer' or 'global'", "'all'"),
    ),
    "scope of masks": (
        lambda: agent_optax.magnitude_masks(PARAMS, 0.5, scope="all"),
        ValueError,
        ("'global' or 'layer'", "'all'"),
    ),
    "pruning to nowhere": (
        lambda: sparse(topology=agent_optax.gradual_pruning(stop=500), sparsity=None, masks=tree(BATCH > 0)),
        ValueError,
        ("sparsity=0.9",),
    ),
    "compact pruning": (
        lambda: sparse(topology=agent_optax.gradual_pruning(stop=500), storage="compact"),
        ValueError,
        ("GradualPruning", "storage='dense'"),
    ),
    "compact redistribution": (
        lambda: sparse(topology=agent_optax.snfs(), storage="compact"),
        ValueError,
        ("storage='dense'",),
    ),
    "compact rewiring": (
        lambda: sparse(topology=agent_optax.bayesian_rewiring(0.1, 10), storage="compact"),
        ValueError,
        ("BayesianRewiring", "storage='dense'"),
    ),
    "staggered pruning": (
        lambda: sparse(topology=agent_optax.gradual_pruning(stop=500), stagger=True),
        ValueError,
        ("stagger=True", "all of them at once"),
    ),
    "steps in an epoch": (lambda: agent_optax.bayesian_rewiring(0.1, 0), ValueError, ("steps_per_epoch", "got 0")),
    "negative noise": (
        lambda: agent_optax.bayesian_rewiring(0.1, 10, noise_scale=-1.0),
        ValueError,
        ("noise_scale must not be negative, got -1.0",),
    ),
    "density of connections": (
        lambda: agent_optax.bayesian_rewiring(0.1, 10, density=2.0),
        ValueError,
        ("[0, 1], got 2.0",),
    ),
    # patterns
    "too many of a group": (lambda: agent_optax.n_m(5, 4), ValueError, ("n=5, m=4", "n_m(2, 4)")),
    "half a group": (lambda: agent_optax.n_m(0.5, 4), ValueError, ("n must be a whole number", "got 0.5")),
    "block size": (lambda: agent_optax.blocks((0, 4)), ValueError, ("-1 for a whole axis", "(0, 4)")),
    "block shape": (lambda: agent_optax.blocks(4), ValueError, ("such as (4, 4), got 4",)),
    "no pattern": (lambda: sparse(pattern="2:4"), TypeError, ("n_m(2, 4)", "got '2:4'")),
    "pattern of a leaf": (lambda: sparse(pattern=lambda path: 4), TypeError, ("dense/kernel", "4")),
    "pattern and sparsity": (
        lambda: sparse(pattern=agent_optax.n_m(1, 4)),
        ValueError,
        ("sparsity=0.5 does not fit", "0.75"),
    ),
    "groups that do not divide": (
        lambda: sparse(sparsity=None, pattern=agent_optax.n_m(2, 3)),
        ValueError,
        ("multiple of 3", "dense/kernel has layers of the shape (4, 4)", "where="),
    ),
    "no function of axes": (
        lambda: sparse(axes=agent_optax.Axes(inputs=0, outputs=1)),
        TypeError,
        ("axes must be a function", "lambda name, shape", "got Axes(stack=(), spatial=(), inputs=(0,), outputs=(1,))"),
    ),
    "no axes from the function": (lambda: sparse(axes=lambda name, shape: 0), TypeError, ("dense/kernel", "gave 0")),
    "an axis without a role": (
        lambda: sparse(axes=lambda name, shape: agent_optax.Axes(inputs=0) if "kernel" in name else None),
        ValueError,
        (
            "inputs=(0,)",
            "for dense/kernel, which has the shape (4, 4): name each of its 2 axes exactly once",
        ),
    ),
    "no axis": (lambda: agent_optax.Axes(inputs="in"), TypeError, ("inputs must be an axis", "got 'in'")),
    "groups and redistribution": (
        lambda: sparse(sparsity=None, pattern=agent_optax.n_m(2, 4), topology=agent_optax.snfs()),
        ValueError,
        ("cannot be kept by", "agent_optax.rigl()"),
    ),
    "blocks and rewiring": (
        lambda: sparse(pattern=agent_optax.blocks((2, 2)), topology=agent_optax.bayesian_rewiring(0.1, 10)),
        ValueError,
        ("cannot be kept by", "agent_optax.rigl()"),
    ),
    "masks without the pattern": (
        lambda: sparse(masks=tree(jnp.eye(4) > 0), pattern=agent_optax.n_m(2, 4)),
        ValueError,
        ("masks= does not have the pattern", "dense/kernel"),
    ),
    # sparsity
    "no sparsity": (lambda: sparse(sparsity=None), ValueError, ("sparsity=0.9", "masks=")),
    "sparsity 1": (lambda: sparse(sparsity=1.0), ValueError, ("must lie in [0, 1), got 1.0", IS_A_SHARE)),
    "sparsity negative": (lambda: sparse(sparsity=-0.1), ValueError, ("must lie in [0, 1), got -0.1", IS_A_SHARE)),
    "sparsity nan": (lambda: sparse(sparsity=np.nan), ValueError, ("must be a finite number, got nan", IS_A_SHARE)),
    "sparsity text": (lambda: sparse(sparsity="0.9"), ValueError, ("sparsity= must be a number", "got '0.9'")),
    "sparsity array": (
        lambda: sparse(sparsity=jnp.asarray(0.5)),
        ValueError,
        ("must be a plain number", "Array(0.5", "static_args=('sparsity'"),
    ),
    "sparsity injected": (
        lambda: optax.inject_hyperparams(sparsify, static_args=("distribution", "where"))(
            optax.sgd(0.1), rigl(), sparsity=0.5
        ).init(PARAMS),
        ValueError,
        ("must be a plain number", "static_args=('sparsity', 'distribution', 'where'"),
    ),
    "sparsity of an unknown leaf": (
        lambda: sparse(sparsity={"kernel": 0.5}),
        ValueError,
        ("sparsity= must be a tree like params", "params has dense/bias, dense/kernel; sparsity= has kernel."),
    ),
    "sparsity of too few leaves": (
        lambda: sparse(sparsity={"dense": {"kernel": 0.5}}),
        ValueError,
        ("sparsity= must be a tree like params", "sparsity= has dense/kernel."),
    ),
    "sparsity of a leaf": (
        lambda: sparse(sparsity=tree(1.5)),
        ValueError,
        ("sparsity of dense/kernel must lie in [0, 1), got 1.5", IS_A_SHARE),
    ),
    "sparsity from a path": (
        lambda: sparse(sparsity=lambda path: -1),
        ValueError,
        ("sparsity of dense/kernel must lie in [0, 1), got -1", IS_A_SHARE),
    ),
    # distribution
    "distribution of another length": (
        lambda: sparse(distribution=lambda shapes, sparsity: [0.5, 0.25]),
        ValueError,
        ("one density for each of the 1 layers to prune, dense/kernel", "got [0.5, 0.25]"),
    ),
    "distribution above 1": (
        lambda: sparse(distribution=lambda shapes, sparsity: [1.5]),
        ValueError,
        ("the density of dense/kernel", "must lie in [0, 1], got 1.5"),
    ),
    "erk of a vector": (
        lambda: sparse(where=True),
        ValueError,
        ("got the shape (4,)", "Exclude this leaf with where=, or use distribution=agent_optax.uniform"),
    ),
    "erk, sparsity 1": (lambda: agent_optax.erk([(3, 3)], 1.0), ValueError, ("in [0, 1), got 1.0", IS_A_SHARE)),
    "uniform, sparsity 2": (lambda: agent_optax.uniform([(3,)], 2), ValueError, ("in [0, 1), got 2", IS_A_SHARE)),
    # where, masks
    "where of an unknown leaf": (
        lambda: sparse(where={"kernel": True}),
        ValueError,
        ("where= must be a tree like params", "params has dense/bias, dense/kernel; where= has kernel."),
    ),
    "where nothing": (
        lambda: sparse(where=lambda params: jax.tree.map(lambda p: False, params)),
        ValueError,
        ("selects no leaf to prune", "where=lambda params: jax.tree.map(lambda p: True, params)"),
    ),
    "nothing to prune": (
        lambda: sparsify(optax.sgd(0.1), rigl(), sparsity=0.5).init({"b": jnp.ones(3)}),
        ValueError,
        ("selects no leaf to prune", "agent_optax.kernels, takes leaves of two or more axes"),
    ),
    "whole numbers": (
        lambda: sparsify(optax.sgd(0.1), rigl(), sparsity=0.5).init({"table": jnp.ones((3, 3), int)}),
        TypeError,
        ("the leaf table of dtype int32", "only floating-point leaves can be pruned"),
    ),
    "masks of an unknown leaf": (
        lambda: sparse(masks={"kernel": BATCH > 0}),
        ValueError,
        ("masks= must be a tree like params, with None where nothing is pruned", "masks= has kernel."),
    ),
    "masks of another shape": (
        lambda: sparse(masks=tree(jnp.ones((2, 4), bool))),
        ValueError,
        ("for dense/kernel the mask is bool[2, 4] and the leaf [4, 4]", "Use None where nothing is pruned"),
    ),
    "masks of numbers": (
        lambda: sparse(masks=tree(BATCH)),
        ValueError,
        ("must be boolean", "the mask is float32[4, 4]", "Use None where nothing is pruned"),
    ),
    "masks of none": (lambda: sparse(masks=tree(None)), ValueError, ("holds no mask", "give a boolean array")),
    # parts of sparsify
    "optimizer not called": (lambda: sparse(inner=optax.sgd), TypeError, ("inner must be", "optax.sgd(0.1)", "sgd at")),
    "topology not called": (lambda: sparse(topology=rigl), TypeError, ("topology must be", "rigl()", "rigl at")),
    "topology by name": (lambda: sparse(topology="rigl"), TypeError, ("agent_optax.rigl()", "got 'rigl'")),
    "key": (lambda: sparse(key=0.5), TypeError, ("key must be a seed such as 0", "jax.random.key(0)", "got 0.5")),
    "grow_by": (lambda: sparse(grow_by="momentum"), ValueError, ("must be 'raw' or 'corrected', got 'momentum'",)),
    "grow_by without a correction": (
        lambda: update(sparsify(optax.sgd(0.1), rigl(), sparsity=0.5, grow_by="corrected"), PARAMS),
        ValueError,
        ("exactly one correct_gradients inside the inner optimizer, found 0", "Use grow_by='raw', or put"),
    ),
    "storage": (lambda: sparse(storage="csr"), ValueError, ("must be 'dense' or 'compact', got 'csr'",)),
    "compact growth by the corrected gradient": (
        lambda: sparse(storage="compact", grow_by="corrected"),
        ValueError,
        ("use grow_by='raw' or storage='dense'",),
    ),
    "compact muon": (
        lambda: sparse(storage="compact", inner=optax.contrib.muon(0.1)),
        ValueError,
        ("treats each entry alike", 'Use storage="dense"'),
    ),
    "compact adafactor": (
        lambda: sparse(storage="compact", inner=optax.adafactor(0.1, min_dim_size_to_factor=2)),
        ValueError,
        ("treats each entry alike", 'Use storage="dense"'),
    ),
    "sparse update without params": (
        lambda: update(sparsify(optax.sgd(0.1), static(), sparsity=0.5)),
        ValueError,
        ("needs the parameters: call tx.update(grads, opt_state, params, ...)",),
    ),
    # topologies
    "interval negative": (lambda: rigl(-5), ValueError, ("update_every must be a whole number of at least 1, got -5",)),
    "interval zero": (lambda: set_(0), ValueError, ("got 0", "counts optimizer steps between topology updates")),
    "interval fraction": (lambda: rigl(0.5), ValueError, ("got 0.5", "counts optimizer steps between")),
    "interval bool": (lambda: rigl(True), ValueError, ("got True", "counts optimizer steps between")),
    "start zero": (lambda: rigl(10, start=0), ValueError, ("start must be", "got 0", "steps are counted from 1")),
    "stop negative": (lambda: rigl(10, stop=-1), ValueError, ("stop must be", "got -1", "None never stops")),
    "stop at start": (
        lambda: set_(10, start=20, stop=20),
        ValueError,
        ("got start=20, stop=20", "Use agent_optax.static() for that"),
    ),
    "stop before the first update": (lambda: rigl(10, stop=10), ValueError, ("got start=10, stop=10", "static()")),
    "drop_fraction above 1": (
        lambda: rigl(drop_fraction=1.5),
        ValueError,
        ("drop_fraction must lie in [0, 1], got 1.5", "share of a layer's active weights that is replaced"),
    ),
    "drop_fraction negative": (lambda: set_(drop_fraction=-0.1), ValueError, ("in [0, 1], got -0.1",)),
    "drop_fraction text": (lambda: set_(drop_fraction="all"), ValueError, ("a finite number, got 'all'",)),
    "total_steps": (lambda: agent_optax.rigl_itop(0), ValueError, ("total_steps must be", "got 0", "whole training")),
    "total_steps float": (lambda: agent_optax.set_itop(1e5), ValueError, ("got 100000.0", "whole training run")),
    # selection
    "k negative": (lambda: agent_optax.top_k_mask(BATCH, -1), ValueError, ("number of scores, 16, got -1",)),
    "k too large": (lambda: agent_optax.top_k_mask(BATCH, 17), ValueError, ("number of scores, 16, got 17",)),
    "k a fraction": (lambda: agent_optax.top_k_mask(BATCH, 0.5), TypeError, ("whole number, got 0.5", "how many")),
    "scores complex": (
        lambda: agent_optax.top_k_mask(BATCH.astype(complex), 1),
        TypeError,
        ("must be real, got dtype complex64", "jnp.abs(scores)"),
    ),
    # parts of correct_gradients
    "memory not called": (
        lambda: correct_gradients(agent_optax.snapshot),
        TypeError,
        ("memory must be", "agent_optax.snapshot()", "got <function snapshot"),
    ),
    "coefficient a number": (
        lambda: correct_gradients(coefficient=0.5),
        TypeError,
        ("coefficient must be", "agent_optax.constant(1.0)", "got 0.5"),
    ),
    "scaling nan": (lambda: correct_gradients(scaling=np.nan), ValueError, ("scaling must", "got nan", "takes 0.1")),
    "scaling text": (lambda: correct_gradients(scaling="0.1"), ValueError, ("scaling must", "got '0.1'")),
    "smoothing": (lambda: loss_regression(1.2), ValueError, ("smoothing must lie in [0, 1], got 1.2", "takes 0.3")),
    "smoothing of agent": (lambda: agent_optax.agent(0.1, smoothing=-1), ValueError, ("in [0, 1], got -1", "0.3")),
    "initial": (lambda: loss_regression(initial=np.inf), ValueError, ("initial must", "got inf", "starts at 0")),
    "decay of losses": (lambda: loss_regression(decay=1.0), ValueError, ("decay must lie in [0, 1), got 1.0", "0.98")),
    "decay of gradients": (lambda: gradient_regression(-0.5), ValueError, ("in [0, 1), got -0.5", "about fifty steps")),
    "decay of history": (lambda: history(1.0), ValueError, ("decay must lie in [0, 1), got 1.0", "0.99")),
    "scope": (
        lambda: gradient_regression(scope="layer"),
        ValueError,
        ("must be 'all' (one coefficient) or 'leaf' (one a leaf), got 'layer'",),
    ),
    "constant": (lambda: constant("1"), ValueError, ("c must be a finite number, got '1'", "1.0 gives plain SVRG")),
    "schedule": (
        lambda: agent_optax.scheduled(0.5),
        TypeError,
        ("such as optax.linear_schedule", "got 0.5", "agent_optax.constant(0.5)"),
    ),
    "table of none": (lambda: agent_optax.table(0), ValueError, ("num_batches must be", "got 0", "of an epoch")),
    "cache of none": (
        lambda: agent_optax.snapshot(cached_batches=-1),
        ValueError,
        ("cached_batches must be", "got -1", "None caches nothing"),
    ),
    "a of STORM": (lambda: agent_optax.storm(0.1, a=2.0), ValueError, ("a must lie in [0, 1], got 2.0", "1 is SGD")),
    "num_refreshes": (lambda: agent_optax.alpha_svrg(0.1, 0), ValueError, ("got 0", "counts the calls of refresh")),
    "initial of alpha-SVRG": (lambda: agent_optax.alpha_svrg(0.1, 5, 2.0), ValueError, ("got 2.0", "take 0.75")),
    "b1 of MARS": (lambda: agent_optax.mars(0.1, b1=1.0), ValueError, ("b1 must lie in [0, 1), got 1.0", "0.95")),
    "gamma of MARS": (lambda: agent_optax.mars(0.1, gamma="1"), ValueError, ("got '1'", "0 corrects nothing")),
    "max_norm of MARS": (lambda: agent_optax.mars(0.1, max_norm=0.0), ValueError, ("got 0.0", "None does not clip")),
    # what update needs
    "old_grads missing": (
        lambda: update(AGENT, PARAMS),
        ValueError,
        ("the extra argument old_grads= of update", "agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)"),
    ),
    "old_grads missing inside sparsify": (
        lambda: update(sparsify(AGENT, rigl(), sparsity=0.5), PARAMS),
        ValueError,
        ("the extra argument old_grads= of update", "tx.update(grads, opt_state, params, **extras)"),
    ),
    "old_grads of another tree": (
        lambda: update(AGENT, PARAMS, old_grads={"kernel": BATCH}),
        ValueError,
        ("old_grads= must be a tree like the gradient", "{'kernel': *}", "agent_optax.value_and_grads"),
    ),
    "old_grads of another shape": (
        lambda: update(AGENT, PARAMS, old_grads=tree(jnp.ones((2, 4)), jnp.ones(4))),
        ValueError,
        ("old_grads= must be a tree like the gradient", "(2, 4)", "agent_optax.value_and_grads"),
    ),
    "params missing for STORM": (
        lambda: update(agent_optax.storm(0.1), old_grads=PARAMS),
        ValueError,
        ("remembers the parameters of each step", "tx.update(grads, opt_state, params, **extras)"),
    ),
    "value missing": (
        lambda: update(correct_gradients(history(), loss_regression()), PARAMS),
        ValueError,
        ("the extra argument value= of update", "agent_optax.value_and_grads"),
    ),
    "batch_index missing": (
        lambda: update(correct_gradients(agent_optax.table(3)), PARAMS),
        ValueError,
        ("batch_index= of update", "3 batches of an epoch", "batch_index=i"),
    ),
    "batch_index out of range": (
        lambda: update(correct_gradients(agent_optax.table(3)), PARAMS, batch_index=3),
        ValueError,
        ("batch_index must lie in 0 ... 2, got 3", "count batches from 0 each epoch"),
    ),
    "whole numbers corrected": (
        lambda: AGENT.init({"table": jnp.ones(3, int)}),
        TypeError,
        ("the leaf ['table'] has dtype int32", "Leave it out with optax.masked or optax.partition"),
    ),
    # refresh
    "refresh without a correction": (
        lambda: refreshed(BATCH, optax.sgd(0.1)),
        ValueError,
        (
            "opt_state holds no correct_gradients at all",
            "memory=agent_optax.snapshot()",
            "leave the call to refresh out",
        ),
    ),
    "refresh without a snapshot": (
        lambda: refreshed(BATCH, correct_gradients(history())),
        ValueError,
        ("opt_state holds only HistoryState", "leave the call to refresh out"),
    ),
    "no stacked batch": (
        lambda: refreshed(jnp.ones((0, 4, 4))),
        ValueError,
        ("one leading axis of the same, non-zero length", "got lengths {'': 0}", "iter(list_of_batches)"),
    ),
    "stacked batches of unequal number": (
        lambda: refreshed({"x": jnp.ones((2, 4, 4)), "y": jnp.ones((3, 4))}),
        ValueError,
        ("\"['x']\": 2, \"['y']\": 3", "iter(list_of_batches)"),
    ),
    "a batch that is a number": (lambda: refreshed(jnp.ones(())), ValueError, ("'none'", "iter(list_of_batches)")),
    "no batch in an iterator": (
        lambda: refreshed(iter([])),
        ValueError,
        ("got no batch", "used up by an earlier pass"),
    ),
    "batches of unequal size": (
        lambda: refreshed(iter([BATCH, BATCH[:2]])),
        ValueError,
        ("batch 0 has shapes (4, 4), batch 1 has (2, 4)", "Drop the remainder of the data set, or pad it"),
    ),
    "batches of another number than cached": (
        lambda: refreshed(jnp.ones((2, 4, 4)), correct_gradients(agent_optax.snapshot(cached_batches=3))),
        ValueError,
        ("has 2 batches, but the memory is snapshot(cached_batches=3)", "Pass exactly the 3 batches of an epoch"),
    ),
    "more batches in an iterator than cached": (
        lambda: refreshed(iter([BATCH] * 2), correct_gradients(agent_optax.snapshot(cached_batches=1))),
        ValueError,
        ("has at least 2 batches", "Pass exactly the 1 batches"),
    ),
    "no batches": (lambda: refreshed(None), TypeError, ("a leading axis of batches, or an iterator", "got None")),
    "two snapshots": (
        lambda: agent_optax.value_and_grads(loss)(PARAMS, optax.chain(AGENT, AGENT).init(PARAMS), BATCH),
        ValueError,
        ("two corrections in opt_state want the old gradient of the same parameter", "optax.partition"),
    ),
    # what is read off a state
    "snapshot_params": (
        lambda: agent_optax.snapshot_params(optax.sgd(0.1).init(PARAMS), PARAMS),
        ValueError,
        ("holds no snapshot", "correct_gradients(memory=agent_optax.snapshot())"),
    ),
    "mask_params": (
        lambda: agent_optax.mask_params(PARAMS, AGENT.init(PARAMS)),
        ValueError,
        ("holds no sparse optimizer", "agent_optax.sparsify(inner, topology, ...)"),
    ),
    "active_masks": (
        lambda: agent_optax.active_masks(AGENT.init(PARAMS), PARAMS),
        ValueError,
        ("holds no sparse optimizer", "agent_optax.sparsify(inner, topology, ...)"),
    ),
    "a statistic by which to grow": (
        lambda: agent_optax.drop_and_grow(grow=agent_optax.movement()),
        TypeError,
        ("grow must be a score of the step alone", "pass it as drop="),
    ),
    "a score without its statistic": (
        lambda: update(
            sparsify(optax.sgd(0.1), agent_optax.drop_and_grow(grow=agent_optax.fisher().__call__), sparsity=0.5),
            PARAMS,
        ),
        ValueError,
        ("a score that keeps a statistic", "gradual_pruning(score=)"),
    ),
    "decay of fisher": (lambda: agent_optax.fisher(1.0), ValueError, ("decay must lie in [0, 1), got 1.0",)),
    "power": (lambda: agent_optax.gradual_pruning(900, power=0), ValueError, ("power must be positive, got 0",)),
    "a score for pruning": (
        lambda: agent_optax.gradual_pruning(900, score="movement"),
        TypeError,
        ("score must be a score such as agent_optax.weight_magnitude, got 'movement'",),
    ),
    "phases that end dense": (
        lambda: agent_optax.ac_dc([100, 150]),
        ValueError,
        ("switches must be an odd number of ascending steps, got [100, 150]",),
    ),
    "phases in disorder": (lambda: agent_optax.ac_dc([3, 2, 4]), ValueError, ("got [3, 2, 4]", "[100, 150, 200]")),
    "a phase before the start": (lambda: agent_optax.ac_dc([0]), ValueError, ("a step in switches", "got 0")),
    "a statistic straight through": (
        lambda: agent_optax.straight_through(agent_optax.fisher()),
        TypeError,
        ("Fisher(decay=0.999) keeps a statistic: use gradual_pruning",),
    ),
    "decay straight through": (
        lambda: agent_optax.straight_through(decay=-1e-4),
        ValueError,
        ("decay must not be negative, got -0.0001",),
    ),
    "corrected growth straight through": (
        lambda: sparse(topology=agent_optax.straight_through(), grow_by="corrected"),
        ValueError,
        ("by weights that all positions keep: use grow_by='raw'",),
    ),
    "compact storage straight through": (
        lambda: sparse(topology=agent_optax.straight_through(), storage="compact"),
        ValueError,
        ("keeps weights in whole arrays", "use storage='dense', got 'compact'"),
    ),
    "what to normalize": (
        lambda: agent_optax.normalized("l2"),
        TypeError,
        ("score must be a score such as agent_optax.weight_magnitude, got 'l2'",),
    ),
    "a score that is a tree": (
        lambda: agent_optax.score_masks(PARAMS, PARAMS, 0.5),
        TypeError,
        ("score must be a function of params", "agent_optax.snip(loss_fn, batch)"),
    ),
    "no round": (
        lambda: agent_optax.score_masks(lambda params: params, PARAMS, 0.5, rounds=0),
        ValueError,
        ("rounds must be a whole number of at least 1, got 0",),
    ),
    "a leaf without scores": (
        lambda: agent_optax.score_masks(agent_optax.wanda({}), PARAMS, 0.5),
        ValueError,
        ("an array of the shape [4, 4] for dense/kernel, got None", "where=agent_optax.named(...)"),
    ),
    "scores that overflow": (
        lambda: agent_optax.score_masks(lambda params: jax.tree.map(lambda p: p / 0, params), PARAMS, 0.5),
        ValueError,
        ("the scores of dense/kernel are not all finite", "jax.enable_x64(True)"),
    ),
    "activations of another shape": (
        lambda: agent_optax.score_masks(agent_optax.wanda({"dense": {"kernel": jnp.ones((9, 3))}}), PARAMS, 0.5),
        ValueError,
        ("activations of the shape [..., 4] for dense/kernel", "got [9, 3]", "axes= says"),
    ),
    "masks of different shapes": (
        lambda: agent_optax.mask_overlap([jnp.ones((2, 3), bool)], [jnp.ones((3, 2), bool)]),
        ValueError,
        ("masks must have equal shapes, got (2, 3) in a and (3, 2) in b",),
    ),
    "diagnostics": (
        lambda: agent_optax.diagnostics(optax.sgd(0.1).init(PARAMS)),
        ValueError,
        ("holds neither a correction nor a sparse optimizer", "agent_optax.agent or agent_optax.sparsify"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(mistake: str) -> None:
    make, error, parts = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        make()
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize("sparsity", [0, 0.5, np.float32(0.5), np.float64(0.5)])
def test_numbers_of_numpy_are_numbers(sparsity: Any) -> None:
    state = sparse(sparsity=sparsity, topology=rigl(np.int64(5), np.float32(0.25)))
    assert float(agent_optax.diagnostics(state)["sparsity"]) == sparsity


def test_the_same_masks_from_every_form_of_a_key() -> None:
    keys = [5, np.int64(5), jnp.asarray(5), jax.random.key(5), jax.random.PRNGKey(5)]
    first, *others = [agent_optax.active_masks(sparse(key=key), PARAMS)["dense"]["kernel"] for key in keys]
    for other in others:
        np.testing.assert_array_equal(first, other)
    tx = sparsify(optax.sgd(0.1), set_(1), sparsity=0.5, key=jax.random.key(5, impl="rbg"))
    update(tx, PARAMS)


def test_injected_hyperparameters_are_not_checked() -> None:
    """They are traced: their values are not known."""
    make = optax.inject_hyperparams(sparsify, static_args=("sparsity", "distribution", "where"))
    jax.jit(make(AGENT, rigl(), sparsity=0.5, key=5).init)(PARAMS)

    def optimizer(drop_fraction: Any, scaling: Any, smoothing: Any) -> Any:
        correction = correct_gradients(coefficient=loss_regression(smoothing), scaling=scaling)
        return sparsify(optax.chain(correction, optax.sgd(0.1)), set_(10, drop_fraction), sparsity=0.5)

    jax.jit(optax.inject_hyperparams(optimizer)(0.3, 0.1, 0.3).init)(PARAMS)
