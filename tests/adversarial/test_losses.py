"""TRADES and MART beyond the golden numbers: limits, dtypes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agent_optax import adversarial

LOSSES = [adversarial.trades_loss, adversarial.mart_loss]


@pytest.fixture
def logits():
    clean, attacked = jax.random.normal(jax.random.key(0), (2, 6, 4))
    return 2 * clean, 2 * attacked, jnp.asarray([0, 1, 2, 3, 0, 1])


def test_trades_with_weight_zero_is_the_cross_entropy(logits):
    clean, attacked, labels = logits
    expected = optax.softmax_cross_entropy_with_integer_labels(clean, labels).mean()
    np.testing.assert_allclose(adversarial.trades_loss(clean, attacked, labels, beta=0.0), expected, rtol=1e-6)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_the_default_weight_is_the_papers(loss_fn, logits):
    assert loss_fn(*logits) == loss_fn(*logits, beta=6.0) != loss_fn(*logits, beta=5.0)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_without_an_attack_the_weight_does_not_matter(loss_fn, logits):
    clean, _, labels = logits
    light, heavy = (loss_fn(clean, clean, labels, beta) for beta in (0.0, 100.0))
    np.testing.assert_allclose(light, heavy, rtol=1e-5)


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_widened(loss_fn, dtype, logits):
    narrow = [array.astype(dtype) for array in logits[:2]]
    loss, gradients = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(*narrow, logits[2])
    assert loss.dtype == jnp.float32 and gradients[0].dtype == gradients[1].dtype == dtype
    widened = loss_fn(*(array.astype(jnp.float32) for array in narrow), logits[2])
    np.testing.assert_allclose(loss, widened, rtol=1e-6)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_confident_logits_stay_finite(loss_fn):
    clean, attacked = jnp.asarray([[100.0, -100.0]]), jnp.asarray([[-100.0, 100.0]])
    loss, gradients = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(clean, attacked, jnp.asarray([0]))
    assert np.isfinite(loss) and np.all(np.isfinite(gradients))


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_jit_with_a_weight_schedule_compiles_once(loss_fn, logits):
    traces = []

    @jax.jit
    def loss(beta):
        traces.append(None)
        return loss_fn(*logits, beta)

    np.testing.assert_allclose(loss(2.0), loss_fn(*logits, 2.0), rtol=1e-6)
    loss(3.0)
    assert len(traces) == 1


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_errors(loss_fn, logits):
    clean, attacked, labels = logits
    with pytest.raises(ValueError, match=r"beta must not be negative, got -1\.0: .*6\.0"):
        loss_fn(clean, attacked, labels, beta=-1.0)
    with pytest.raises(ValueError, match=r"labels must be integer classes, got dtype float32"):
        loss_fn(clean, attacked, jax.nn.one_hot(labels, 4))
    with pytest.raises(ValueError, match=r"labels must have the batch axis .* 6, got shape \(5,\)"):
        loss_fn(clean, attacked, labels[:5])
    with pytest.raises(ValueError, match=r"labels must be one class per sample, got shape \(6, 1\)"):
        loss_fn(clean, attacked, labels[:, None])
    with pytest.raises(ValueError, match=r"must have one shape, got \(6, 4\) and \(5, 4\)"):
        loss_fn(clean, attacked[:5], labels)
    with pytest.raises(ValueError, match=r"logits must be floats of shape \[B, K\], got int32"):
        loss_fn(clean.astype(int), attacked, labels)
    with pytest.raises(ValueError, match=r"adversarial_logits must be floats .* shape \(4,\)"):
        loss_fn(clean, attacked[0], labels)
