"""Several sparse optimizers in one, for parts of the parameters: each its own topology, and totals over all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import jit

import agent_optax

SHAPES = {"actor": (8, 6), "critic": (20, 10)}
COUNTED = ("num_dropped", "num_grown", "num_nonzero_inactive", "num_topology_updates", "num_skipped_updates")


def sparse(topology: Any, sparsity: float, storage: str = "dense") -> Any:
    return agent_optax.sparsify(optax.sgd(0.1), topology, sparsity=sparsity, storage=storage)


def parts() -> dict[str, Any]:
    return {
        "actor": optax.chain(optax.clip(1.0), sparse(agent_optax.rigl(2), 0.5)),
        "critic": sparse(agent_optax.set_(1), 0.9, "compact"),
    }


def partitioned() -> Any:
    return optax.partition(parts(), {name: name for name in SHAPES})


def chained() -> Any:
    only = lambda name: {other: other == name for other in SHAPES}  # noqa: E731
    return optax.chain(*(optax.masked(tx, only(name)) for name, tx in parts().items()))


@pytest.mark.parametrize(
    ("make", "names"), [(partitioned, ("actor", "critic")), (chained, ("0/1", "1"))], ids=["partition", "chain"]
)
def test_totals_and_parts(make: Any, names: tuple[str, str]) -> None:
    tx = make()
    params = {name: jax.random.normal(jax.random.key(k), shape) for k, (name, shape) in enumerate(SHAPES.items())}
    opt_state, update = tx.init(params), jit(tx.update)
    params, ever = agent_optax.mask_params(params, opt_state), agent_optax.active_masks(opt_state, params)
    for _ in range(4):
        updates, opt_state = update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        masks = agent_optax.active_masks(opt_state, params)
        ever = jax.tree.map(jnp.logical_or, ever, masks)
    params["actor"] = params["actor"].at[jnp.nonzero(~masks["actor"], size=1)].set(1.0)  # spoilt from outside
    report = jax.jit(agent_optax.diagnostics)(opt_state, params)

    for part, (name, inactive) in zip(names, (("actor", 24), ("critic", 180)), strict=True):
        assert float(report[f"{part}/sparsity"]) == pytest.approx(inactive / masks[name].size)
        assert float(report[f"{part}/exploration_rate"]) == pytest.approx(float(np.mean(ever[name])))
    assert [int(report[f"{part}/num_topology_updates"]) for part in names] == [2, 4]
    assert [int(report[f"{part}/num_nonzero_inactive"]) for part in names] == [1, 0]
    assert float(report["sparsity"]) == pytest.approx(204 / 248)
    assert float(report["exploration_rate"]) == pytest.approx(sum(int(e.sum()) for e in ever.values()) / 248)
    for key in COUNTED:
        assert report[key] == sum(report[f"{part}/{key}"] for part in names)
    assert len(report) == 3 * 7


def test_one_alone_has_no_name() -> None:
    tx = optax.partition(
        {"sparse": sparse(agent_optax.static(), 0.5), "dense": optax.sgd(0.1)}, {"a": "sparse", "b": "dense"}
    )
    report = agent_optax.diagnostics(tx.init({"a": jnp.ones((4, 4)), "b": jnp.ones(4)}))
    assert set(report) == {"sparsity", "exploration_rate", *COUNTED}


class Agent(NamedTuple):
    actor: Any
    critic: Any


def test_states_side_by_side_have_the_names_of_their_fields() -> None:
    tx = sparse(agent_optax.static(), 0.5)
    report = agent_optax.diagnostics(Agent(tx.init(jnp.ones((4, 4))), tx.init(jnp.ones((2, 4)))))
    assert {name.split("/")[0] for name in report if "/" in name} == {"actor", "critic"}
    assert float(report["sparsity"]) == 0.5
