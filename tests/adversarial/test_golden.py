"""Attacks and losses give the numbers of the authors' published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_optax import adversarial
from agent_optax.adversarial._divergence import kl_divergence

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
SINGLE = {"rtol": 0, "atol": 2e-7}  # a few roundings of numbers up to 1
DOUBLE = {"rtol": 1e-9, "atol": 1e-12}


def test_input_gradient(case):
    prefix, logits_fn, params, x, y, numbers = case(jnp.float32)
    loss_fn = adversarial.cross_entropy(logits_fn)
    gradient = jax.grad(lambda x: loss_fn(params, x, y).sum())(x)
    np.testing.assert_allclose(gradient, numbers[f"{prefix}_ce_grad"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm(case, targeted):
    prefix, logits_fn, params, x, y, numbers = case(jnp.float32)
    loss_fn = adversarial.cross_entropy(logits_fn)
    attack = adversarial.fgsm(loss_fn, epsilon=EPSILON, targeted=targeted)
    expected = numbers[f"{prefix}_fgsm" + "_targeted" * targeted]
    np.testing.assert_allclose(attack(params, x, y), expected, **SINGLE)


@pytest.mark.parametrize("name", ["pgd", "pgd_eta"])
def test_pgd_iterates(case, name):
    prefix, logits_fn, params, x, y, numbers = case(jnp.float32)
    start = x + numbers["eta"] if name == "pgd_eta" else x

    def build(num_steps):
        loss_fn = adversarial.cross_entropy(logits_fn)
        return adversarial.pgd(loss_fn, epsilon=EPSILON, step_size=STEP_SIZE, num_steps=num_steps, random_start=False)

    check_iterates(build, (params, x, y), start, numbers[f"{prefix}_{name}"], **SINGLE)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_trades_and_mart_iterates(x64, case, name):
    prefix, logits_fn, params, x, y, numbers = case(jnp.float64)
    start = x + 0.001 * numbers["noise"]

    def build(num_steps):
        make = getattr(adversarial, f"{name}_attack")
        return make(logits_fn, epsilon=EPSILON, step_size=STEP_SIZE, num_steps=num_steps)

    check_iterates(build, (params, x, y), start, numbers[f"{prefix}_{name}_adv"], **DOUBLE)


def check_iterates(build, args, start, expected, **tolerance):
    """Ten steps one by one, each from the end of the one before, and ten in one go."""
    one, ten = jax.jit(build(1)), jax.jit(build(10))
    x = start
    for iterate in expected:
        x = one(*args, start=x)
        assert x.dtype == expected.dtype
        np.testing.assert_allclose(x, iterate, **tolerance)
    np.testing.assert_array_equal(ten(*args, start=start), x)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("beta", [6.0, 1.0])
@pytest.mark.parametrize("name", ["trades", "mart"])
def test_losses(x64, golden, name, beta, index):
    numbers = golden("losses_bsr")
    logits, attacked = numbers[f"logits_nat_{index}"], numbers[f"logits_adv_{index}"]
    prefix = f"{name}_b{round(10 * beta)}_{index}"

    loss_fn = getattr(adversarial, f"{name}_loss")
    loss, (clean_grad, attacked_grad) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(
        jnp.asarray(logits), jnp.asarray(attacked), numbers[f"y_{index}"], beta
    )
    np.testing.assert_allclose(loss, numbers[f"{prefix}_loss"], rtol=1e-9)
    for gradient, argument in ((clean_grad, "nat"), (attacked_grad, "adv")):
        expected = numbers[f"{prefix}_grad_{argument}"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("index", [0, 1])
def test_divergence_and_accuracy(x64, golden, index):
    numbers = golden("losses_bsr")
    logits, attacked = numbers[f"logits_nat_{index}"], numbers[f"logits_adv_{index}"]
    labels = numbers[f"y_{index}"]
    divergence = kl_divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(attacked))
    np.testing.assert_allclose(divergence, numbers[f"kl_elem_{index}"].sum(-1), rtol=1e-9)
    np.testing.assert_allclose(divergence.sum(), numbers[f"kl_sum_{index}"], rtol=1e-9)
    still = adversarial.fgsm(adversarial.cross_entropy(lambda _, x: x), epsilon=0.0)
    accuracy = adversarial.robust_accuracy(lambda _, x: x, None, logits, labels, attack=still, restarts=1, key=0)
    np.testing.assert_allclose(accuracy, numbers[f"acc_{index}"], rtol=1e-7)
