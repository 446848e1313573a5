"""Bad input gets an error that quotes it and names the fix."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import agent_optax

PARAMS = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}


def loss(params, batch):
    return jnp.sum(params["w"]) * jnp.mean(batch)


def sparse(**changes):
    arguments = {"inner": optax.sgd(0.1), "topology": agent_optax.rigl(), "sparsity": 0.5} | changes
    return agent_optax.sparsify(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse(sparsity=1.0), "1.0"),
        (lambda: sparse(sparsity=-0.1), "-0.1"),
        (lambda: sparse(sparsity=None), "sparsity="),
        (lambda: sparse(sparsity=jnp.asarray(0.5)), "static_args"),
        (lambda: sparse(grow_by="momentum"), "'momentum'"),
        (lambda: sparse(storage="tiny"), "'tiny'"),
        (lambda: agent_optax.rigl(update_every=0), "update_every.*0"),
        (lambda: agent_optax.set_(update_every=-3), "-3"),
        (lambda: agent_optax.rigl(start=0), "start.*0"),
        (lambda: agent_optax.rigl(update_every=10, stop=10), "stop.*static"),
        (lambda: agent_optax.rigl(drop_fraction=1.5), "1.5"),
        (lambda: agent_optax.set_itop(total_steps=0), "total_steps.*0"),
        (lambda: agent_optax.erk([(3,)], 0.5), r"\(3,\).*uniform"),
        (lambda: agent_optax.uniform([(3, 3)], 1.2), "1.2"),
        (lambda: agent_optax.correct_gradients(scaling=float("nan")), "nan"),
        (lambda: agent_optax.loss_regression(smoothing=2.0), "2.0"),
        (lambda: agent_optax.loss_regression(initial=float("inf")), "inf"),
        (lambda: agent_optax.gradient_regression(decay=1.0), "1.0"),
        (lambda: agent_optax.gradient_regression(scope="layer"), "'layer'"),
        (lambda: agent_optax.constant(float("nan")), "nan"),
        (lambda: agent_optax.history(decay=-0.5), "-0.5"),
        (lambda: agent_optax.top_k_mask(jnp.ones(3), 4), "4"),
    ],
)
def test_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": {"w": True, "c": True}}, "where="),
        ({"where": lambda params: {"w": False, "b": False}}, "selects no leaf"),
        ({"sparsity": {"w": 0.5, "c": 0.5}}, "sparsity must be"),
        ({"sparsity": lambda path: 1.5}, "1.5"),
        ({"masks": {"w": np.ones((2, 2), bool), "b": None}}, r"\[2, 2\]"),
        ({"masks": {"w": np.ones((4, 4), bool), "c": None}}, "masks="),
    ],
)
def test_trees_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse(**changes).init(PARAMS)


def test_leaves_that_are_not_floating():
    integers = {"w": jnp.ones((4, 4), jnp.int32)}
    with pytest.raises(TypeError, match="int32"):
        sparse().init(integers)
    with pytest.raises(TypeError, match="int32"):
        agent_optax.agent(0.1).init(integers)


def test_missing_arguments_of_update():
    tx = agent_optax.agent(0.1)
    with pytest.raises(ValueError, match=r"old_grads=.*value_and_grads"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    tx = sparse()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_refresh():
    state = agent_optax.agent(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="no correct_gradients at all"):
        agent_optax.refresh(loss, PARAMS, optax.sgd(0.1).init(PARAMS), jnp.ones((2, 3)))
    history = agent_optax.correct_gradients(agent_optax.history()).init(PARAMS)
    with pytest.raises(ValueError, match="HistoryState"):
        agent_optax.refresh(loss, PARAMS, history, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="equal size"):
        agent_optax.refresh(loss, PARAMS, state, iter([jnp.ones(3), jnp.ones(2)]))
    with pytest.raises(ValueError, match="leading axis"):
        agent_optax.refresh(loss, PARAMS, state, (jnp.ones((2, 3)), jnp.ones((3, 3))))
    with pytest.raises(ValueError, match="no batch"):
        agent_optax.refresh(loss, PARAMS, state, iter([]))
    with pytest.raises(ValueError, match="no snapshot"):
        agent_optax.snapshot_params(history, PARAMS)


def test_states_without_what_is_asked_for():
    state = optax.sgd(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="no sparse optimizer"):
        agent_optax.mask_params(PARAMS, state)
    with pytest.raises(ValueError, match="no sparse optimizer"):
        agent_optax.active_masks(state, PARAMS)
    with pytest.raises(ValueError, match="neither"):
        agent_optax.diagnostics(state)
    corrected = sparse(grow_by="corrected")
    with pytest.raises(ValueError, match="exactly one correct_gradients"):
        corrected.update(PARAMS, corrected.init(PARAMS), PARAMS)
