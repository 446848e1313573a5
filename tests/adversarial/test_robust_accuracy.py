"""Robust accuracy: the worst case over what an attack visits, exactly and monotonically."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_optax import adversarial


def evaluator(logits_fn, *, num_steps=3, epsilon=0.06, step_size=0.02, **options):
    loss_fn = adversarial.cross_entropy(logits_fn)
    attack = adversarial.pgd(loss_fn, epsilon=epsilon, step_size=step_size, num_steps=num_steps)
    options = {"attack": attack, "restarts": 2, "batch_size": 5, **options}
    return jax.jit(functools.partial(adversarial.robust_accuracy, logits_fn, **options))


def test_a_linear_model_has_its_closed_form():
    """Of two classes the margin falls by at most epsilon |w|_1, and PGD gets there."""
    weight = jax.random.normal(jax.random.key(0), (7,))
    x = jax.random.uniform(jax.random.key(1), (100, 7), minval=0.3, maxval=0.7)
    offset = -0.5 * weight.sum()
    y = jnp.where(jax.random.bernoulli(jax.random.key(2), 0.9, (100,)), x @ weight + offset > 0, 0)
    y = y.astype(int)

    def logits_fn(weight, x):
        margin = x @ weight + offset
        return jnp.stack([-margin, margin], -1)

    worst = (2 * y - 1) * (x @ weight + offset) - 0.06 * jnp.abs(weight).sum()
    accuracy = evaluator(logits_fn, num_steps=6, batch_size=32)(weight, x, y, key=0)
    np.testing.assert_allclose(accuracy, np.mean(worst > 0), rtol=1e-6)
    assert 0.2 < accuracy < 0.8


def test_more_restarts_and_more_steps_never_raise_it(problem):
    logits_fn, params, x, y = problem
    clean = jnp.mean(jnp.argmax(logits_fn(params, x), -1) == y)
    by_restarts = [evaluator(logits_fn, restarts=r, num_steps=1) for r in (1, 4)]
    by_steps = [evaluator(logits_fn, restarts=1, num_steps=k, step_size=0.05) for k in (1, 4)]
    lowered = [False, False]
    for seed in range(12):
        for index, evaluators in enumerate((by_restarts, by_steps)):
            accuracies = [evaluate(params, x, y, key=seed).item() for evaluate in evaluators]
            assert clean >= accuracies[0] >= accuracies[1]
            lowered[index] |= accuracies[0] > accuracies[1]
    assert all(lowered) and clean < 1


def test_a_point_on_the_way_counts():
    """The walk passes a band where the model is wrong, and ends where it is right."""

    def logits_fn(_, x):
        is_wrong = (x[:, 0] > 0.45) & (x[:, 0] < 0.55)
        return jnp.stack([1.0 - is_wrong, 1.0 * is_wrong], -1)

    def loss_fn(_, x, labels):
        return x[:, 0]

    x, y = jnp.asarray([[0.3], [0.7]]), jnp.zeros(2, int)
    attack = adversarial.pgd(loss_fn, epsilon=1.0, step_size=0.1, num_steps=5, random_start=False)
    assert np.all(jnp.argmax(logits_fn(None, attack(None, x, y)), -1) == y)
    accuracy = adversarial.robust_accuracy(logits_fn, None, x, y, attack=attack, restarts=1, key=0)
    assert accuracy == 0.5


@pytest.mark.parametrize("batch_size", [1, 4, 13, 100])
def test_sample_counts_need_not_divide(problem, batch_size):
    logits_fn, params, x, y = problem
    attack = adversarial.fgsm(adversarial.cross_entropy(logits_fn), epsilon=0.06)
    attacked = attack(params, x, y)
    right = [jnp.argmax(logits_fn(params, x), -1) == y for x in (x, attacked)]
    accuracy = evaluator(logits_fn, attack=attack, restarts=1, batch_size=batch_size)(params, x, y, key=0)
    np.testing.assert_allclose(accuracy, np.mean(right[0] & right[1]), rtol=1e-6)
    assert 0 < accuracy < np.mean(right[0])


def test_the_default_is_the_papers_evaluation(problem):
    logits_fn, params, x, y = problem
    default = jax.jit(functools.partial(adversarial.robust_accuracy, logits_fn))
    spelled_out = evaluator(logits_fn, epsilon=8 / 255, step_size=2 / 255, num_steps=50, restarts=10, batch_size=128)
    assert default(params, x, y, key=7) == spelled_out(params, x, y, key=7)


def test_logits_with_nan_are_wrong():
    x, y = jnp.full((3, 2), 0.5), jnp.zeros(3, int)
    accuracy = adversarial.robust_accuracy(
        lambda scale, x: x * scale, jnp.asarray([jnp.nan, 1.0]), x, y, restarts=1, key=0
    )
    assert accuracy == 0


def test_any_function_with_the_signature_is_an_attack():
    def shift(params, inputs, labels, key=None, *, stop_when=None):
        return inputs[:, ::-1]

    x, y = jnp.asarray([[0.9, 0.1], [0.5, 0.5]]), jnp.zeros(2, int)
    accuracy = adversarial.robust_accuracy(lambda _, x: x, None, x, y, attack=shift, restarts=1, key=0)
    assert accuracy == 0.5


def test_jit_compiles_once_and_vmap_is_the_loop(problem):
    logits_fn, params, x, y = problem
    traces = []

    def counted(params, x):
        traces.append(None)
        return logits_fn(params, x)

    evaluate = evaluator(counted)
    one = evaluate(params, x, y, key=0)
    count = len(traces)
    other = evaluate(jax.tree.map(lambda p: 2 * p, params), x, y, key=0)
    evaluate(params, x, y, key=5)
    assert len(traces) == count

    models = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    mapped = jax.vmap(lambda params: evaluate(params, x, y, key=0))(models)
    np.testing.assert_allclose(mapped, [one, other], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"restarts": 0}, r"restarts must be .* at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be .* at least 1, got 0"),
        ({"key": None}, r"key must be given, got None"),
        ({"inputs": jnp.zeros((0, 2)), "labels": jnp.zeros(0, int)}, r"got shape \(0, 2\)"),
        ({"inputs": jnp.zeros((2, 2), int)}, r"inputs must be floating point, got dtype int32"),
        ({"labels": jnp.zeros((2, 1), int)}, r"labels must be one class per sample, got shape \(2, 1\)"),
        ({"labels": jnp.zeros(2)}, r"labels must be integer classes, got dtype float32"),
    ],
)
def test_errors(change, message):
    arguments = {"inputs": jnp.zeros((2, 2)), "labels": jnp.zeros(2, int), "key": 0, **change}
    with pytest.raises(ValueError, match=message):
        adversarial.robust_accuracy(lambda _, x: x, None, **arguments)
