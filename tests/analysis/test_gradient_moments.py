"""Variance, correlation, coefficient and norms against NumPy in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_optax import analysis


def moments(new: np.ndarray, old: np.ndarray) -> tuple[float, float, float]:
    """Traces of the covariance matrices of gradients [N, D]."""
    new, old = new - new.mean(axis=0), old - old.mean(axis=0)
    return (new**2).sum(axis=1).mean(), (old**2).sum(axis=1).mean(), (new * old).sum(axis=1).mean()


def joined(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([gradients["bias"], gradients["kernel"]], axis=1)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_correlation_is_that_of_numpy(regression, masked):
    masks = regression.masks if masked else None
    measured = jax.jit(functools.partial(analysis.gradient_correlation, regression.loss_fn))(
        regression.new, regression.old, regression.batches, masks=masks
    )
    new, old = (regression.gradients(point, masked) for point in (regression.new, regression.old))
    variance, old_variance, covariance = moments(joined(new), joined(old))
    np.testing.assert_allclose(measured.variance, variance, rtol=1e-12)
    np.testing.assert_allclose(measured.old_variance, old_variance, rtol=1e-12)
    np.testing.assert_allclose(measured.covariance, covariance, rtol=1e-12)
    np.testing.assert_allclose(measured.correlation, covariance / np.sqrt(variance * old_variance), rtol=1e-12)
    for leaf in ("bias", "kernel"):
        variance, old_variance, covariance = moments(new[leaf], old[leaf])
        np.testing.assert_allclose(measured.leaf_variance[leaf], variance, rtol=1e-12)
        np.testing.assert_allclose(measured.leaf_old_variance[leaf], old_variance, rtol=1e-12)
        np.testing.assert_allclose(measured.leaf_covariance[leaf], covariance, rtol=1e-12)
        correlation = covariance / np.sqrt(variance * old_variance)
        np.testing.assert_allclose(measured.leaf_correlation[leaf], correlation, rtol=1e-12)


def test_a_large_mean_does_not_cancel_in_float32(offset_regression):
    """E|g|^2 - |E g|^2 has no correct digit here."""
    regression = offset_regression
    target = 10 * regression.old["kernel"] + 1000
    point, old = ({"bias": regression.new["bias"], "kernel": target + shift} for shift in (0.0, 1.0))
    regression.inputs = np.broadcast_to(regression.inputs[:1], regression.inputs.shape) + 1e-2 * regression.inputs
    new_gradients, old_gradients = regression.gradients(point), regression.gradients(old)
    variance, old_variance, covariance = moments(joined(new_gradients), joined(old_gradients))
    mean_square = (joined(new_gradients) ** 2).sum(axis=1).mean()
    assert variance < 1e-2 * mean_square
    as32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    measured = analysis.gradient_correlation(
        regression.loss_fn, as32(point), as32(old), (as32(regression.inputs), as32(regression.targets))
    )
    assert measured.variance.dtype == jnp.float32
    np.testing.assert_allclose(measured.variance, variance, rtol=1e-3)
    np.testing.assert_allclose(measured.correlation, covariance / np.sqrt(variance * old_variance), rtol=1e-3)


def test_the_same_point_correlates_fully(regression):
    measured = analysis.gradient_correlation(regression.loss_fn, regression.new, regression.new, regression.batches)
    np.testing.assert_allclose(measured.correlation, 1, rtol=1e-14)
    np.testing.assert_allclose(measured.variance, measured.old_variance)


def test_more_noise_correlates_less():
    """Of a network, whose gradient is not linear in its weights; averaged over three draws of the noise."""

    def loss_fn(params, batch):
        inputs, targets = batch
        return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    params = {"hidden": jax.random.normal(keys[0], (4, 16)), "out": jax.random.normal(keys[1], (16,))}
    batches = jax.random.normal(keys[2], (40, 8, 4)), jax.random.normal(keys[3], (40, 8))

    @jax.jit
    def correlation(scale, key):
        nearby = analysis.perturb(params, scale, key)
        return analysis.gradient_correlation(loss_fn, params, nearby, batches).correlation

    keys = jax.random.split(jax.random.key(1), 3)
    at = [float(jnp.mean(jax.vmap(correlation, (None, 0))(scale, keys))) for scale in (0.0, 0.1, 0.5, 2.0)]
    assert at[0] == pytest.approx(1, abs=1e-5)
    assert at == sorted(at, reverse=True) and at[-1] < 0.8 < at[1]


def test_batch_size_divides_the_variance():
    """Of the mean of B independent samples: a B-th."""

    def loss_fn(params, batch):
        return jnp.mean(batch @ params)

    samples = jax.random.normal(jax.random.key(0), (64_000, 3)) * jnp.array([1.0, 2.0, 3.0])
    for batch_size in (1, 4, 16):
        measured = analysis.gradient_correlation(loss_fn, jnp.ones(3), jnp.ones(3), samples.reshape(-1, batch_size, 3))
        assert float(measured.variance) == pytest.approx(14 / batch_size, rel=0.05)  # 1 + 4 + 9; sd of it below 0.03


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
    """Sums of a thousand terms would stall in half precision."""

    def loss_fn(params, batch):
        return jnp.vdot(params, batch)

    batches = jax.random.normal(jax.random.key(0), (1000, 8)).astype(dtype)
    measured = analysis.gradient_correlation(loss_fn, jnp.ones(8, dtype), jnp.zeros(8, dtype), batches)
    exact = np.asarray(batches, np.float64)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(measured))
    np.testing.assert_allclose(measured.variance, exact.var(axis=0).sum(), rtol=1e-5)
    norms = analysis.gradient_norms(loss_fn, jnp.ones(8, dtype), batches)
    np.testing.assert_allclose(norms.full_norm, np.linalg.norm(exact.mean(axis=0)), rtol=1e-5)


def test_no_gradient_is_kept(regression):
    """No array in the compiled program has an axis of batches and the size of a gradient."""
    num_batches, shape = len(regression.inputs), regression.new["kernel"].shape
    for function in (analysis.gradient_correlation, analysis.optimal_coefficient):
        text = str(
            jax.make_jaxpr(functools.partial(function, regression.loss_fn))(
                regression.new, regression.old, regression.batches
            )
        )
        assert "scan" in text
        assert f"[{num_batches},{shape[0]},{shape[1]}]" not in text


@pytest.mark.parametrize("masked", [False, True])
def test_optimal_coefficient_is_that_of_numpy(regression, masked):
    masks = regression.masks if masked else None
    points = regression.new, regression.old
    measured = analysis.optimal_coefficient(regression.loss_fn, *points, regression.batches, masks=masks)
    new, old = (regression.gradients(point, masked) for point in points)
    variance, old_variance, covariance = moments(joined(new), joined(old))
    optimal = covariance / old_variance
    np.testing.assert_allclose(measured.optimal, optimal, rtol=1e-12)
    losses, old_losses = (regression.losses(point) for point in points)
    estimate = np.cov(losses, old_losses)[0, 1] / np.var(old_losses, ddof=1)
    np.testing.assert_allclose(measured.loss_estimate, estimate, rtol=1e-12)
    for weight, ratio in (
        (optimal, measured.optimal_variance_ratio),
        (estimate, measured.loss_estimate_variance_ratio),
    ):
        corrected = joined(new) - weight * (joined(old) - joined(old).mean(axis=0))
        np.testing.assert_allclose(ratio, moments(corrected, corrected)[0] / variance, rtol=1e-12)


def test_a_coefficient_a_leaf_does_no_worse(regression):
    points = regression.new, regression.old
    shared = analysis.optimal_coefficient(regression.loss_fn, *points, regression.batches)
    own = analysis.optimal_coefficient(regression.loss_fn, *points, regression.batches, scope="leaf")
    new, old = (regression.gradients(point) for point in points)
    left = 0.0
    for leaf in ("bias", "kernel"):
        variance, old_variance, covariance = moments(new[leaf], old[leaf])
        np.testing.assert_allclose(own.optimal[leaf], covariance / old_variance, rtol=1e-12)
        left += variance - covariance**2 / old_variance
    np.testing.assert_allclose(own.optimal_variance_ratio, left / moments(joined(new), joined(new))[0], rtol=1e-12)
    assert own.optimal_variance_ratio < shared.optimal_variance_ratio < 1
    np.testing.assert_allclose(own.loss_estimate, shared.loss_estimate)


def test_a_leaf_without_gradient_has_coefficient_zero(regression):
    masks = {"bias": None, "kernel": np.zeros((3, 2), bool)}
    own = analysis.optimal_coefficient(
        regression.loss_fn, regression.new, regression.old, regression.batches, masks=masks, scope="leaf"
    )
    assert float(own.optimal["kernel"]) == 0 and float(own.optimal["bias"]) != 0
    assert np.isfinite(float(own.optimal_variance_ratio))


def test_variance_ratio_is_that_of_the_corrected_gradients(regression):
    points = regression.new, regression.old
    weights = jnp.array([[-0.5, 0.0, 0.1], [0.5, 1.0, 2.0]])
    ratios = analysis.variance_ratio(regression.loss_fn, *points, regression.batches, weights)
    new, old = (joined(regression.gradients(point)) for point in points)
    for weight, ratio in zip(weights.ravel(), ratios.ravel(), strict=True):
        corrected = new - float(weight) * (old - old.mean(axis=0))
        error = ((corrected - new.mean(axis=0)) ** 2).sum(axis=1).mean()  # around the raw mean: it is unbiased
        np.testing.assert_allclose(ratio, error / moments(new, new)[0], rtol=1e-12)
    assert ratios.shape == weights.shape and float(ratios[0, 1]) == 1
    best = analysis.optimal_coefficient(regression.loss_fn, *points, regression.batches)
    assert (ratios >= best.optimal_variance_ratio).all()
    alone = analysis.variance_ratio(regression.loss_fn, *points, regression.batches, 0.5)
    np.testing.assert_allclose(alone, ratios[1, 0], rtol=1e-15)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_norms_are_those_of_numpy(regression, masked):
    masks = regression.masks if masked else None
    norms = jax.jit(functools.partial(analysis.gradient_norms, regression.loss_fn))(
        regression.new, regression.batches, masks=masks
    )
    gradients = regression.gradients(regression.new, masked)
    np.testing.assert_allclose(norms.full_norm, np.linalg.norm(joined(gradients).mean(axis=0)), rtol=1e-12)
    np.testing.assert_allclose(norms.batch_norms, np.linalg.norm(joined(gradients), axis=1), rtol=1e-12)
    for leaf, of_batches in gradients.items():
        np.testing.assert_allclose(norms.leaf_full_norm[leaf], np.linalg.norm(of_batches.mean(axis=0)), rtol=1e-12)
        np.testing.assert_allclose(norms.leaf_batch_norms[leaf], np.linalg.norm(of_batches, axis=1), rtol=1e-12)
    variance = analysis.gradient_correlation(
        regression.loss_fn, regression.new, regression.new, regression.batches, masks=masks
    ).variance
    np.testing.assert_allclose(jnp.mean(norms.batch_norms**2) - norms.full_norm**2, variance, rtol=1e-10)


def test_auxiliary_output_is_dropped(regression):
    def with_aux(params, batch):
        return regression.loss_fn(params, batch), {"inputs": batch[0]}

    arguments = (regression.new, regression.old, regression.batches)
    for function in (
        analysis.gradient_correlation,
        analysis.optimal_coefficient,
        functools.partial(analysis.variance_ratio, weight=0.3),
        lambda loss_fn, params, old, batches, **kw: analysis.gradient_norms(loss_fn, params, batches, **kw),
    ):
        plain, aux = function(regression.loss_fn, *arguments), function(with_aux, *arguments, has_aux=True)
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(aux), strict=True))


def test_perturb_moves_by_the_relative_size():
    params = {"bias": jnp.zeros(5), "kernel": 3 * jax.random.normal(jax.random.key(0), (200, 100))}
    nearby = jax.jit(analysis.perturb)(params, 0.05, jax.random.key(1))
    moved = nearby["kernel"] - params["kernel"]
    relative = float(jnp.linalg.norm(moved) / jnp.linalg.norm(params["kernel"]))
    assert relative == pytest.approx(0.05, rel=0.02)  # sd of the norm: 1 / sqrt(2 * 20,000) = 0.5%
    assert abs(float(jnp.mean(moved))) < 5 * 0.05 * 3 / np.sqrt(20_000)
    assert not nearby["bias"].any()
    again, other = (analysis.perturb(params, 0.05, key)["kernel"] for key in (1, 2))
    np.testing.assert_allclose(again, nearby["kernel"], rtol=0, atol=1e-6)  # an int is a key; jit rounds on its own
    assert float(jnp.abs(again - other).min()) < float(jnp.abs(again - other).max())


def test_perturb_moves_active_weights_only():
    mask = jax.random.bernoulli(jax.random.key(0), 0.1, (200, 100))
    params = {"bias": jnp.ones(5, jnp.bfloat16), "kernel": jnp.where(mask, 2.0, 0.0)}
    nearby = analysis.perturb(params, 0.1, 0, masks={"bias": None, "kernel": mask})
    assert not nearby["kernel"][~mask].any()
    assert (nearby["kernel"][mask] != 2).all()
    assert float(jnp.std(nearby["kernel"][mask])) == pytest.approx(0.2, rel=0.1)  # of the active weights' size
    assert nearby["bias"].dtype == jnp.bfloat16 and (nearby["bias"] != 1).any()


def test_leaves_are_moved_independently():
    nearby = analysis.perturb([jnp.ones(50), jnp.ones(50)], 0.1, 0)
    assert not jnp.allclose(nearby[0], nearby[1])
