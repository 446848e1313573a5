"""How far each memory and coefficient gets below the noise floor of SGD, on regularised logistic regression.

    python benchmarks/variance_reduction.py

prints a table and saves benchmarks/variance_reduction.png. The problem is strongly convex and all methods take the same
constant step, so what is seen is variance reduction alone. Costs are counted in gradient evaluations: one is a forward
and backward pass over the whole data set, and the forward pass that `loss_regression` adds to a refresh is a third.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import agent_optax

TARGET = 1e-6  # suboptimality whose cost the table gives
FIGURE = Path(__file__).with_suffix(".png")


@dataclasses.dataclass(frozen=True)
class Config:
    """The problem and the runs."""

    num_batches: int = 20
    batch_size: int = 10
    dimension: int = 15
    penalty: float = 0.05  # of the squared norm
    learning_rate: float = 1.0
    num_epochs: int = 60
    num_seeds: int = 5
    output: Path = FIGURE


class Problem(NamedTuple):
    """Logistic regression with an L2 term."""

    batches: tuple[jax.Array, jax.Array]  # inputs [N, B, D], labels -1 or 1 [N, B]
    penalty: float

    def loss(self, params: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean loss of a batch."""
        inputs, labels = batch
        return jnp.mean(jnp.logaddexp(0, -labels * (inputs @ params))) + self.penalty / 2 * jnp.sum(params**2)

    def full_loss(self, params: jax.Array) -> jax.Array:
        """Mean loss of all samples."""
        return jnp.mean(jax.vmap(self.loss, (None, 0))(params, self.batches))

    def least_loss(self) -> jax.Array:
        """By Newton's method."""
        params = jnp.zeros(self.batches[0].shape[-1])
        for _ in range(20):
            params -= jnp.linalg.solve(jax.hessian(self.full_loss)(params), jax.grad(self.full_loss)(params))
        return self.full_loss(params)


class Method(NamedTuple):
    """A gradient estimate."""

    correction: optax.GradientTransformationExtraArgs
    evaluations: float  # an epoch
    color: str
    style: str = "-"
    has_refresh: bool = False


def make_problem(config: Config) -> Problem:
    """Noisy linear labels; inputs of unequal scale, so that curvatures differ."""
    rng = np.random.default_rng(0)
    shape = (config.num_batches, config.batch_size)
    inputs = rng.normal(size=(*shape, config.dimension)) * np.linspace(0.3, 1.0, config.dimension)
    labels = np.sign(inputs @ rng.normal(size=config.dimension) + rng.normal(size=shape))
    return Problem((jnp.asarray(inputs), jnp.asarray(labels)), config.penalty)


def methods(num_batches: int) -> dict[str, Method]:
    """Everything that corrects, under the name that it is known by."""
    snapshot, cached, table = agent_optax.snapshot(), agent_optax.snapshot(num_batches), agent_optax.table(num_batches)
    one, regression = agent_optax.constant(1.0), agent_optax.gradient_regression()

    def correct(memory: Any, coefficient: Any, scaling: float = 1.0) -> optax.GradientTransformationExtraArgs:
        return agent_optax.correct_gradients(memory, coefficient, scaling)

    def storm(a: Any) -> optax.GradientTransformationExtraArgs:
        return correct(agent_optax.recursion(), agent_optax.scheduled(lambda step: 1 - a(step)))

    return {
        "SGD": Method(optax.with_extra_args_support(optax.identity()), 1, "#6b6b6b"),
        "AGENT as published": Method(
            correct(snapshot, agent_optax.loss_regression(), 0.1), 10 / 3, "#b5651d", has_refresh=True
        ),
        "STORM, a = 0.1": Method(storm(lambda step: 0.1), 2, "#7a5195", "--"),
        "STORM, a = 0.01": Method(storm(lambda step: 0.01), 2, "#7a5195", "-."),
        "STORM, a = 1/t": Method(storm(lambda step: 1 / (1 + step)), 2, "#7a5195"),
        "SAGA": Method(correct(table, one), 1, "#2f7d4f"),
        "SAGA, gradient regression": Method(correct(table, regression), 1, "#2f7d4f", "--"),
        "SVRG": Method(correct(snapshot, one), 3, "#1f5f99", has_refresh=True),
        "SVRG, cached": Method(correct(cached, one), 2, "#1f5f99", "-.", has_refresh=True),
        "gradient regression, cached": Method(correct(cached, regression), 2, "#c2334d", has_refresh=True),
    }


def run(problem: Problem, method: Method, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Suboptimality, and error of the estimate relative to the raw gradient's, after each epoch: [seeds, epochs]."""
    num_batches, least = config.num_batches, problem.least_loss()
    tx = optax.chain(method.correction, optax.sgd(config.learning_rate))
    grads_fn = agent_optax.value_and_grads(problem.loss)

    def gradient(params: Any, opt_state: Any, index: Any) -> tuple[Any, dict[str, Any]]:
        batch = jax.tree.map(lambda leaf: leaf[index], problem.batches)
        (_, grads), extras = grads_fn(params, opt_state, batch)
        return grads, {"batch_index": index, **extras}

    def error_ratio(params: Any, opt_state: Any) -> jax.Array:
        """Over all batches: mean squared distance to the full gradient, of the estimate over that of the raw one."""

        def errors(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            grads, extras = gradient(params, opt_state, index)
            estimate, _ = method.correction.update(grads, opt_state[0], params, **extras)
            return jnp.sum((estimate - full) ** 2), jnp.sum((grads - full) ** 2)

        full = jax.grad(problem.full_loss)(params)
        corrected, raw = jax.vmap(errors)(jnp.arange(num_batches))
        return corrected.mean() / raw.mean()

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        grads, extras = gradient(params, opt_state, index)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, opt_state = carry
        if method.has_refresh:
            opt_state = agent_optax.refresh(problem.loss, params, opt_state, problem.batches)
        indices = jax.random.randint(key, (num_batches,), 0, num_batches)
        params, opt_state = carry = jax.lax.scan(step, (params, opt_state), indices)[0]
        return carry, (problem.full_loss(params) - least, error_ratio(params, opt_state))

    def trajectory(seed: jax.Array) -> Any:
        params = jnp.zeros(config.dimension)
        keys = jax.random.split(jax.random.key(seed), config.num_epochs)
        return jax.lax.scan(epoch, (params, tx.init(params)), keys)[1]

    return tuple(map(np.asarray, jax.jit(jax.vmap(trajectory))(jnp.arange(config.num_seeds))))


def passes_to(target: float, curve: np.ndarray, evaluations: float) -> float:
    """Gradient evaluations until `curve` stays at or below `target`; infinite when it does not."""
    above = np.flatnonzero(curve > target)
    first = 0 if not len(above) else above[-1] + 1
    return (first + 1) * evaluations if first < len(curve) else np.inf


def main(config: Config) -> None:
    """Prints the table and saves the figure."""
    jax.config.update("jax_enable_x64", True)
    problem = make_problem(config)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    table = Table(title="Logistic regression, batches with replacement; medians of runs")
    for column in (
        "method",
        "evaluations an epoch",
        f"evaluations to {TARGET:g}",
        "final suboptimality",
        "error ratio",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, method in methods(config.num_batches).items():
        suboptimality, ratio = (np.median(values, axis=0) for values in run(problem, method, config))
        half = config.num_epochs // 2
        table.add_row(
            name,
            f"{method.evaluations:.3g}",
            f"{passes_to(TARGET, suboptimality, method.evaluations):.3g}",
            f"{max(np.median(suboptimality[half:]), 0):.1e}",
            f"{np.median(ratio[half:]):.1e}",
        )
        look = {"color": method.color, "linestyle": method.style, "label": name, "linewidth": 1.6}
        passes = method.evaluations * np.arange(1, config.num_epochs + 1)
        axes[0].semilogy(passes, np.maximum(suboptimality, 1e-16), **look)
        axes[1].semilogy(np.arange(1, config.num_epochs + 1), np.maximum(ratio, 1e-16), **look)
    axes[0].set(
        xlabel="gradient evaluations, in passes over the data",
        ylabel="loss above the least loss",
        xlim=(0, 2 * config.num_epochs),
        ylim=(1e-16, 1),
        title=f"The same constant step {config.learning_rate:g} for all",
    )
    axes[1].set(
        xlabel="epoch",
        ylabel="squared error of the estimate / of the batch gradient",
        ylim=(1e-16, 1e1),
        title="Error of the gradient estimate",
    )
    axes[0].legend(fontsize=8, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.5)
    figure.savefig(config.output, dpi=150)
    console = Console(width=120)
    console.print(table)
    console.print(f"The final columns are medians over the second half of {config.num_epochs} epochs. {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config))
