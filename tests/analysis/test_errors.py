"""Bad input gets an error that quotes the value and names the fix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax
from agent_optax import analysis

PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
BATCHES = jnp.ones((4, 5, 3))


def loss_fn(params, batch):
    return jnp.mean(batch @ params["kernel"] + params["bias"])


def correlation(params=PARAMS, old_params=PARAMS, batches=BATCHES, **kwargs) -> Any:
    return analysis.gradient_correlation(loss_fn, params, old_params, batches, **kwargs)


def ratio(weight) -> Any:
    return analysis.variance_ratio(loss_fn, PARAMS, PARAMS, BATCHES, weight)


SGD = optax.sgd(0.1)

# What is done wrong, the error, and what the message says: the value, and the fix.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no batch axis": (
        lambda: correlation(batches=(BATCHES, jnp.ones(()))),
        ValueError,
        ("one leading axis of batches", "'[0]': (4, 5, 3), '[1]': ()", "jnp.stack"),
    ),
    "unequal numbers of batches": (
        lambda: analysis.gradient_norms(loss_fn, PARAMS, {"x": BATCHES, "y": BATCHES[:2]}),
        ValueError,
        ("of the same, non-zero length", "(2, 5, 3)"),
    ),
    "no batch": (lambda: correlation(batches=BATCHES[:0]), ValueError, ("non-zero length", "(0, 5, 3)")),
    "batches of nothing": (lambda: correlation(batches=()), ValueError, ("must be a tree of arrays", "got shapes {}")),
    "another tree": (
        lambda: correlation(old_params={"kernel": jnp.ones((3, 2))}),
        ValueError,
        ("old_params must be a tree like params", "agent_optax.snapshot_params(opt_state, params)"),
    ),
    "another shape": (
        lambda: correlation(old_params={**PARAMS, "kernel": jnp.ones((2, 3))}),
        ValueError,
        ("['kernel'] has shape (2, 3) and params there (3, 2)",),
    ),
    "integer parameters": (
        lambda: correlation(params={**PARAMS, "bias": jnp.ones(2, int)}),
        TypeError,
        ("agent_optax.analysis works on floating-point parameters", "['bias'] has dtype int32"),
    ),
    "mask of another shape": (
        lambda: correlation(masks={"bias": None, "kernel": jnp.ones((2, 3), bool)}),
        ValueError,
        ("for kernel the mask is bool[2, 3] and the leaf [3, 2]", "Use None where nothing is pruned"),
    ),
    "no masks at all": (
        lambda: analysis.perturb(PARAMS, 0.1, 0, masks={"bias": None, "kernel": None}),
        ValueError,
        ("masks= holds no mask",),
    ),
    "unknown scope": (
        lambda: analysis.optimal_coefficient(loss_fn, PARAMS, PARAMS, BATCHES, scope="layer"),
        ValueError,
        ('scope must be "all" or "leaf", got \'layer\'',),
    ),
    "weight nan": (lambda: ratio(np.nan), ValueError, ("weight must be a finite number, got nan", "1.0 is SVRG")),
    "weight tree": (lambda: ratio({"a": 1}), TypeError, ("weight must be a number or an array", "{'a': 1}")),
    "scale negative": (lambda: analysis.perturb(PARAMS, -0.1, 0), ValueError, ("must not be negative, got -0.1",)),
    "scale text": (
        lambda: analysis.perturb(PARAMS, "0.1", 0),
        ValueError,
        ("scale must be a finite number, got '0.1'",),
    ),
    "no correction": (
        lambda: analysis.estimator_error(loss_fn, PARAMS, SGD.init(PARAMS), BATCHES),
        ValueError,
        ("holds no correction", "agent_optax.correct_gradients", "tx="),
    ),
    "an optimizer for an estimate": (
        lambda: analysis.estimator_error(
            loss_fn,
            PARAMS,
            (tx := agent_optax.sparsify(SGD, agent_optax.rigl(), sparsity=0.5, storage="compact")).init(PARAMS),
            BATCHES,
            tx=tx,
        ),
        ValueError,
        ("must be an estimate of the gradient", "not an optimizer around it"),
    ),
    "state and masks": (
        lambda: analysis.sparsity_summary(PARAMS, SGD.init(PARAMS), masks={}),
        ValueError,
        ("pass opt_state or masks, not both",),
    ),
    "nothing sparse": (
        lambda: analysis.sparsity_summary(PARAMS, SGD.init(PARAMS)),
        ValueError,
        ("holds no sparse optimizer", "agent_optax.sparsify"),
    ),
    "inputs without a model": (
        lambda: analysis.sparsity_summary(PARAMS, example_inputs=[BATCHES[0], BATCHES[1]]),
        ValueError,
        ("example_inputs= needs apply_fn=, got 2 inputs",),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, error, fragments = MISTAKES[name]
    with pytest.raises(error) as caught:
        make()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_summary_is_not_for_jit():
    tx = agent_optax.sparsify(SGD, agent_optax.rigl(), sparsity=0.5)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.jit(lambda params: analysis.sparsity_summary(params, tx.init(params)).total.num_active)(PARAMS)


def test_a_single_batch_has_no_variance():
    measured = correlation(batches=BATCHES[:1])
    assert float(measured.variance) == 0 and np.isnan(float(measured.correlation))
    assert float(analysis.optimal_coefficient(loss_fn, PARAMS, PARAMS, BATCHES[:1]).optimal) == 0
