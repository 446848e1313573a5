"""What attacks promise besides their numbers: purity, keys, restarts, stopping, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent_optax import adversarial
from agent_optax.adversarial._start import as_key, gaussian_start

STEPS = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 4}


def build(name, logits_fn):
    loss_fn = adversarial.cross_entropy(logits_fn)
    return {
        "fgsm": lambda: adversarial.fgsm(loss_fn, epsilon=0.1),
        "pgd": lambda: adversarial.pgd(loss_fn, **STEPS),
        "restarts": lambda: adversarial.pgd(loss_fn, **STEPS, restarts=3),
        "trades": lambda: adversarial.trades_attack(logits_fn, **STEPS),
        "mart": lambda: adversarial.mart_attack(logits_fn, **STEPS),
        "mixed": lambda: adversarial.mixed_attack(adversarial.pgd(loss_fn, **STEPS)),
    }[name]()


@pytest.fixture(params=["fgsm", "restarts", "trades", "mart"])
def name(request):
    return request.param


def test_jit_compiles_once_and_agrees_with_eager(name, problem):
    logits_fn, params, x, y = problem
    traces = []

    @jax.jit
    def attacked(params, x, y, key):
        traces.append(None)
        return build(name, logits_fn)(params, x, y, key)

    for seed in range(3):
        once = attacked(params, x, y, seed)
    assert len(traces) == 1
    eager = build(name, logits_fn)(params, x, y, 2)
    np.testing.assert_allclose(once, eager, rtol=0, atol=1e-6)
    assert once.shape == x.shape and once.dtype == x.dtype


@pytest.mark.parametrize("name", ["fgsm", "restarts"], indirect=True)
def test_vmap_over_models_is_the_loop(name, problem):
    logits_fn, params, x, y = problem
    models = jax.tree.map(lambda p: jnp.stack([p, 0.5 - p]), params)
    attack = build(name, logits_fn)
    mapped = jax.jit(jax.vmap(attack, (0, None, None, None)))(models, x, y, 0)
    for index, row in enumerate(mapped):
        alone = jax.jit(attack)(jax.tree.map(lambda p: p[index], models), x, y, 0)  # noqa: B023
        np.testing.assert_allclose(row, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "trades"], indirect=True)
def test_no_gradient_flows_through_an_attack(name, problem):
    logits_fn, params, x, y = problem

    def loss(params, attacked=None):
        if attacked is None:  # the attack closes over what is differentiated, as well
            attacked = build(name, lambda _, x: logits_fn(params, x))(params, x, y, 0)
        return adversarial.cross_entropy(logits_fn)(params, attacked, y).mean()

    through = jax.jit(jax.grad(loss))(params)
    constant = jax.grad(loss)(params, build(name, logits_fn)(params, x, y, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), through, constant)


@pytest.mark.parametrize("name", ["pgd", "trades", "mart", "mixed"], indirect=True)
def test_keys(name, problem):
    logits_fn, params, x, y = problem
    attack = build(name, logits_fn)
    assert np.any(attack(params, x, y, 3) != attack(params, x, y, 4))
    with pytest.raises(ValueError, match=r"key must be given, got None.*jax\.random\.key"):
        attack(params, x, y)


def test_an_int_is_a_key():
    starts = [gaussian_start(as_key(key), X, 1.0) for key in (3, jax.random.key(3), jax.random.PRNGKey(3))]
    np.testing.assert_array_equal(starts[0], starts[1])
    np.testing.assert_array_equal(starts[0], starts[2])


def test_a_radius_schedule_does_not_retrace(problem):
    logits_fn, params, x, y = problem
    traces = []

    @jax.jit
    def attacked(epsilon):
        traces.append(None)
        loss_fn = adversarial.cross_entropy(logits_fn)
        attack = adversarial.pgd(loss_fn, epsilon=epsilon, step_size=epsilon / 2, num_steps=3)
        return attack(params, x, y, 0)

    for epsilon in (0.05, 0.1):
        distance = jnp.abs(attacked(epsilon) - x).max()
        np.testing.assert_allclose(distance, epsilon, rtol=1e-5)
    assert len(traces) == 1


def test_attacks_hurt_and_more_restarts_hurt_each_sample_more(problem):
    logits_fn, params, x, y = problem
    loss_fn = adversarial.cross_entropy(logits_fn)
    loss = {0: loss_fn(params, x, y)}
    for restarts in (1, 4):
        attack = adversarial.pgd(loss_fn, **STEPS, restarts=restarts)
        loss[restarts] = loss_fn(params, attack(params, x, y, 0), y)
    assert loss[1].mean() > loss[0].mean() + 0.05
    assert np.all(loss[4] >= loss[1]) and np.any(loss[4] > loss[1])


def test_targeted_attacks_lower_the_target_loss(problem):
    logits_fn, params, x, _ = problem
    loss_fn = adversarial.cross_entropy(logits_fn)
    target = jnp.full(len(x), 2)
    clean = loss_fn(params, x, target)
    losses = []
    for restarts in (1, 3):
        attack = adversarial.pgd(loss_fn, **STEPS, restarts=restarts, targeted=True)
        losses.append(loss_fn(params, attack(params, x, target, 0), target))
    assert np.all(losses[0] < clean) and np.all(losses[1] <= losses[0])


def test_start_is_projected_and_needs_no_key(problem):
    logits_fn, params, x, y = problem
    attack = adversarial.pgd(adversarial.cross_entropy(logits_fn), **STEPS)
    far = attack(params, x, y, start=x + 9.0, stop_when=lambda x: jnp.ones(len(x), bool))
    np.testing.assert_allclose(far, jnp.minimum(x + 0.1, 1.0), rtol=1e-6)


def walk(num_steps=5, **options):
    """An attack that walks up by 0.1, whatever the model, from the input."""

    def loss_fn(params, x, labels):
        return x[:, 0]

    options = {"random_start": False, **options}
    return adversarial.pgd(loss_fn, epsilon=1.0, step_size=0.1, num_steps=num_steps, **options)


def test_stop_when_leaves_a_sample_at_the_first_such_point():
    x, y = jnp.asarray([[0.0], [0.2], [0.5], [0.3]]), jnp.zeros(4, int)

    def in_band(x):
        return (x[:, 0] > 0.35) & (x[:, 0] < 0.55)

    stopped = walk()(None, x, y, stop_when=in_band)[:, 0]
    np.testing.assert_allclose(stopped, [0.4, 0.4, 0.5, 0.4], atol=1e-6)


def test_the_loop_ends_when_all_have_stopped():
    evaluations = []

    def loss_fn(params, x, labels):
        jax.debug.callback(lambda: evaluations.append(None))
        return x[:, 0]

    attack = adversarial.pgd(loss_fn, epsilon=1.0, step_size=0.1, num_steps=50, random_start=False)
    x, y = jnp.zeros((2, 1)), jnp.zeros(2, int)
    jax.block_until_ready(attack(None, x, y, stop_when=lambda x: x[:, 0] > 0.25))
    jax.effects_barrier()
    assert len(evaluations) == 4  # at 0, 0.1, 0.2 and 0.3


def test_restarts_keep_a_point_that_ends_the_search():
    """Even for one with a higher loss that does not."""

    def loss_fn(params, x, labels):
        return jnp.abs(x[:, 0] - 0.5)

    def stop_when(x):
        return x[:, 0] < 0.5

    attack = adversarial.pgd(loss_fn, epsilon=0.4, step_size=0.01, num_steps=2, restarts=8)
    x, y = jnp.full((20, 1), 0.5), jnp.zeros(20, int)
    assert np.all(stop_when(attack(None, x, y, 0, stop_when=stop_when)))
    assert not np.all(stop_when(attack(None, x, y, 0)))


def test_an_entry_with_nan_gradient_stays():
    def loss_fn(params, x, labels):
        return jnp.sum(x * jnp.asarray([1.0, jnp.nan]), -1)

    x = jnp.asarray([[0.5, 0.5]])
    attacked = adversarial.fgsm(loss_fn, epsilon=0.25)(None, x, jnp.zeros(1, int))
    np.testing.assert_array_equal(attacked, [[0.75, 0.5]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_steps_below_the_resolution_add_up(dtype):
    attack = adversarial.pgd(
        lambda params, x, labels: x[:, 0].astype(jnp.float32),
        **{"epsilon": 0.25, "step_size": 2**-14, "num_steps": 2**11, "random_start": False},
    )
    moved = attack(None, jnp.full((1, 1), 0.5, dtype), jnp.zeros(1, int))
    assert moved.dtype == dtype and moved[0, 0] == 0.625


def test_trades_needs_no_labels(problem):
    logits_fn, params, x, y = problem
    attack = adversarial.trades_attack(logits_fn, **STEPS)
    np.testing.assert_array_equal(attack(params, x, None, 0), attack(params, x, y, 0))


LOSS_FN = adversarial.cross_entropy(lambda params, x: x)
MAKERS = {
    "pgd": lambda **options: adversarial.pgd(LOSS_FN, **{**STEPS, **options}),
    "trades": lambda **options: adversarial.trades_attack(lambda p, x: x, **{**STEPS, **options}),
    "mart": lambda **options: adversarial.mart_attack(lambda p, x: x, **{**STEPS, **options}),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, r"epsilon must not be negative, got -0\.1: .*8/255"),
        ({"epsilon": float("nan")}, r"epsilon must be a finite number, got nan"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be two numbers.*got \(1\.0, 0\.0\)"),
        ({"bounds": (0.0, 0.0)}, r"bounds must be two numbers.*got \(0\.0, 0\.0\)"),
        ({"bounds": 1.0}, r"bounds must be two numbers.*got 1\.0"),
        ({"step_size": 0.0}, r"step_size must be positive, got 0\.0: .*2/255"),
        ({"num_steps": 0}, r"num_steps must be .* at least 1, got 0"),
        ({"num_steps": 2.5}, r"num_steps must be .* at least 1, got 2\.5"),
    ],
)
def test_construction_errors(maker, options, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adversarial.fgsm(LOSS_FN, epsilon=-1), r"epsilon must not be negative, got -1"),
        (lambda: adversarial.fgsm(LOSS_FN, epsilon=0.1, bounds=(2, 1)), r"got \(2, 1\)"),
        (lambda: MAKERS["pgd"](restarts=0), r"restarts must be .* at least 1, got 0"),
        (
            lambda: MAKERS["pgd"](restarts=3, random_start=False),
            r"restarts must be 1 without a random start, got 3: .*random_start=True",
        ),
        (lambda: MAKERS["trades"](start_scale=0.0), r"start_scale must be positive, got 0\.0"),
        (lambda: MAKERS["mart"](start_scale=-1.0), r"start_scale must be positive, got -1\.0"),
    ],
)
def test_construction_errors_of_one(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X, Y = jnp.full((2, 3), 0.5), jnp.zeros(2, int)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.astype(int), Y, r"inputs must be floating point, got dtype int32: .*255"),
        (X[0, 0], Y, r"inputs must have a leading batch axis"),
        (X, Y.astype(float), r"labels must be integer classes, got dtype float32: .*argmax"),
        (X, Y[:1], r"labels must have the batch axis of the inputs, 2, got shape \(1,\)"),
    ],
)
@pytest.mark.parametrize(
    "attack",
    [
        adversarial.fgsm(LOSS_FN, epsilon=0.1),
        MAKERS["pgd"](),
        MAKERS["mart"](),
        adversarial.mixed_attack(MAKERS["pgd"]()),
    ],
)
def test_call_errors(attack, x, y, message):
    with pytest.raises(ValueError, match=message):
        attack(None, x, y, 0)


def test_call_errors_of_one():
    with pytest.raises(ValueError, match=r"inputs must be floating point"):
        MAKERS["trades"]()(None, X.astype(int), Y, 0)
    with pytest.raises(ValueError, match=r"start must be None with restarts=2"):
        MAKERS["pgd"](restarts=2)(None, X, Y, 0, start=X)
    summed = adversarial.fgsm(lambda p, x, y: jnp.sum(x), epsilon=0.1)
    with pytest.raises(ValueError, match=r"one loss per sample, shape \(2,\), got shape \(\): "):
        summed(None, X, Y)
