"""Mixed adversarial training: which samples are attacked, and how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_optax import adversarial


def shift(params, inputs, labels, key=None, *, stop_when=None):
    """The simplest attack."""
    return inputs + 1


def test_half_is_clean_and_half_is_attacked(problem):
    logits_fn, params, x, y = problem
    x, y = x[:8], y[:8]
    attack = adversarial.pgd(adversarial.cross_entropy(logits_fn), epsilon=0.1, step_size=0.03, num_steps=3)
    mixed = adversarial.mixed_attack(attack)(params, x, y, 0)
    np.testing.assert_array_equal(mixed[:4], x[:4])
    np.testing.assert_array_equal(mixed[4:], attack(params, x[4:], y[4:], 0))
    assert np.all(np.abs(mixed[4:] - x[4:]).max((1, 2)) > 0.05)


@pytest.mark.parametrize(
    ("size", "fraction", "attacked"),
    [(13, 0.5, 6), (5, 0.29, 1), (10, 0.3, 3), (4, 0.0, 0), (4, 1.0, 4), (4, 1, 4), (1, 1.0, 1)],
)
def test_fraction(size, fraction, attacked):
    x, y = jnp.zeros(size), jnp.zeros(size, int)
    mixed = adversarial.mixed_attack(shift, fraction=fraction)(None, x, y)
    np.testing.assert_array_equal(mixed, np.arange(size) >= size - attacked)


def test_half_of_one_sample_is_none():
    x, y = jnp.zeros(1), jnp.zeros(1, int)
    np.testing.assert_array_equal(adversarial.mixed_attack(shift)(None, x, y), x)


def test_the_attack_sees_only_what_it_moves():
    seen = []

    def foreign(params, inputs, labels, key=None, *, stop_when=None):
        seen.append((inputs.tolist(), labels.tolist(), stop_when))
        return inputs

    adversarial.mixed_attack(foreign)(None, jnp.arange(6.0), jnp.arange(6))
    assert seen == [([3.0, 4.0, 5.0], [3, 4, 5], None)]


def test_training_on_it_lowers_its_loss(problem):
    logits_fn, params, x, y = problem
    loss_fn = adversarial.cross_entropy(logits_fn)
    mixed = adversarial.mixed_attack(adversarial.fgsm(loss_fn, epsilon=0.05))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        return loss_fn(params, mixed(params, x, y), y).mean()

    losses = []
    for _ in range(40):
        loss, gradient = loss_and_gradient(params)
        losses.append(loss)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
    assert losses[-1] < 0.5 * losses[0]


def test_it_nests():
    halves = adversarial.mixed_attack(adversarial.mixed_attack(shift))
    np.testing.assert_array_equal(halves(None, jnp.zeros(4), jnp.zeros(4, int)), [0, 0, 0, 1])


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_errors(fraction):
    with pytest.raises(ValueError, match=rf"fraction must .*got {fraction}: .*fraction=0\.5"):
        adversarial.mixed_attack(shift, fraction=fraction)


def test_dtype_is_kept():
    mixed = adversarial.mixed_attack(shift)(None, jnp.zeros(4, jnp.bfloat16), jnp.zeros(4, int))
    assert mixed.dtype == jnp.bfloat16
