"""Trains a very sparse MLP on real images under SGD, AGENT as published, and AGENT with gradient regression.

All on SET-ITOP, one topology update in the middle of each epoch; from the same start and through the same batches, seed
by seed. The seeds train at once under `jax.vmap`.

    python examples/quickstart.py                              # scikit-learn's digits
    python examples/quickstart.py --dataset fashion_mnist      # the first 10,000 images of Fashion-MNIST
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
import scipy.stats
import tyro
from data import ImageData, load_digits, load_fashion_mnist, standardise

import agent_optax

HIDDEN, NUM_CLASSES = (300, 100), 10
WEIGHT_DECAY = 5e-4
DEFAULTS = {
    "digits": {"epochs": 30, "seeds": 10, "sparsity": 0.97},
    "fashion_mnist": {"epochs": 10, "seeds": 6, "sparsity": 0.99},
}


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    data_dir: Path | None = None
    """Folder of Fashion-MNIST's four IDX files, gzipped or not. Default: that of Debian's dataset-fashion-mnist."""
    epochs: int | None = None
    """Default: 30 on digits, 10 on fashion_mnist."""
    seeds: int | None = None
    """Default: 10 on digits, 6 on fashion_mnist."""
    batch_size: int = 32
    learning_rate: float = 0.1
    """The default is SGD's best of 0.03, 0.1 and 0.2 on either data set, over all epochs."""
    sparsity: float | None = None
    """Default: 0.97 on digits, 0.99 on fashion_mnist."""
    large_batch: bool = False
    """Also SGD with batches three times as large, in as many steps: another use of as many gradients."""
    plot: Path = Path("quickstart.png")
    smoke: bool = False
    """Two epochs, two seeds and few images: to see that it runs."""

    def completed(self) -> Config:
        defaults = DEFAULTS[self.dataset] | ({"epochs": 2, "seeds": 2} if self.smoke else {})
        config = dataclasses.replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})
        if config.epochs < 2 or config.seeds < 2:
            raise ValueError(f"a spread needs two epochs and two seeds at least, got {config.epochs}, {config.seeds}")
        if config.data_dir is not None and config.dataset == "digits":
            raise ValueError(f"--data-dir {config.data_dir} is of no use to digits: add --dataset fashion_mnist")
        return config


def load(config: Config) -> ImageData:
    data = load_digits() if config.dataset == "digits" else load_fashion_mnist(config.data_dir, num_train=10_000)
    data = standardise(data)
    if len(data.train_images) < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {len(data.train_images)} training images")
    return ImageData(*(array[: 10 * config.batch_size] for array in data)) if config.smoke else data


class Method(NamedTuple):
    optimizer: Callable[[float], optax.GradientTransformation]  # from the learning rate
    gradients: float  # evaluated per image and epoch; the loss alone, a forward pass, counts a third
    corrects: bool = False
    batch_multiple: int = 1


def sgd(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(learning_rate, momentum=0.9, nesterov=True))


def regressing_agent(learning_rate: float) -> optax.GradientTransformation:
    correction = agent_optax.correct_gradients(agent_optax.snapshot(), agent_optax.gradient_regression(), scaling=1.0)
    return optax.chain(correction, sgd(learning_rate))


# AGENT evaluates each gradient at the weights, at the snapshot, and once more for the mean gradient. The coefficient
# of the paper also wants the loss at the old snapshot.
METHODS = {
    "SGD": Method(sgd, gradients=1),
    "AGENT as published": Method(agent_optax.agent, gradients=3 + 1 / 3, corrects=True),
    "AGENT, gradient regression": Method(regressing_agent, gradients=3, corrects=True),
}
LARGE_BATCH = {"SGD, 3x batch": Method(sgd, gradients=3, batch_multiple=3)}


class Curves(NamedTuple):
    accuracy: np.ndarray  # [epochs, seeds], on the test set, in percent
    correlation: np.ndarray  # [epochs, seeds], c before scaling, the mean over an epoch; nan without correction
    sparsity: float  # of the pruned layers, exact
    exploration: float  # R_s, the share of weights that were ever active


def init_params(key: jax.Array, num_inputs: int) -> list[dict[str, jax.Array]]:
    shapes = list(itertools.pairwise((num_inputs, *HIDDEN, NUM_CLASSES)))
    keys = jax.random.split(key, len(shapes))
    he_normal = jax.nn.initializers.he_normal()
    return [{"kernel": he_normal(k, n), "bias": jnp.zeros(n[1])} for k, n in zip(keys, shapes, strict=True)]


def sparse_start(params: Any, opt_state: optax.OptState) -> Any:
    """Exactly sparse parameters; kernels are scaled up so that a unit's input has the variance it has when dense."""

    def scaled(mask: jax.Array | None, param: jax.Array) -> jax.Array:
        return param if mask is None else param / jnp.sqrt(jnp.mean(mask))

    masks = agent_optax.active_masks(opt_state, params)
    return agent_optax.mask_params(jax.tree.map(scaled, masks, params, is_leaf=lambda x: x is None), opt_state)


def logits(params: list[dict[str, jax.Array]], images: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def loss_fn(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels))


def train(method: Method, config: Config, data: ImageData, on_epoch: Callable[[float], None]) -> Curves:
    """Trains all seeds; calls `on_epoch` with the mean test accuracy after each epoch."""
    num_steps = len(data.train_images) // config.batch_size  # a last batch that is not full is left out
    set_itop = agent_optax.set_(
        update_every=num_steps,
        start=max(1, num_steps // 2),  # so that the weights have settled when accuracy is measured
        drop_fraction=optax.cosine_decay_schedule(0.5, config.epochs * num_steps, alpha=0.01),
    )

    def sparse_optimizer(key: jax.Array) -> optax.GradientTransformationExtraArgs:
        return agent_optax.sparsify(method.optimizer(config.learning_rate), set_itop, sparsity=config.sparsity, key=key)

    def start(key: jax.Array) -> tuple[Any, optax.OptState]:
        params_key, topology_key = jax.random.split(jax.random.fold_in(key, 0))
        params = init_params(params_key, data.train_images.shape[1])
        opt_state = sparse_optimizer(topology_key).init(params)
        return sparse_start(params, opt_state), opt_state

    def train_epoch(key: jax.Array, epoch: int, params: Any, opt_state: optax.OptState, data: ImageData) -> tuple:
        keys = jax.random.split(jax.random.fold_in(key, epoch), method.batch_multiple)
        orders = jax.vmap(lambda k: jax.random.permutation(k, len(data.train_images)))(keys)
        indices = orders[:, : num_steps * config.batch_size].reshape(num_steps, -1)
        batches = data.train_images[indices], data.train_labels[indices]
        if method.corrects:
            opt_state = agent_optax.refresh(loss_fn, params, opt_state, batches)
        tx = sparse_optimizer(key)

        def step(carry: tuple, batch: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
            params, opt_state = carry
            (_, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
            updates, opt_state = tx.update(grads, opt_state, params, **extras)
            correlation = agent_optax.diagnostics(opt_state).get("correlation", jnp.nan)
            return (optax.apply_updates(params, updates), opt_state), correlation

        (params, opt_state), correlation = jax.lax.scan(step, (params, opt_state), batches)
        accuracy = 100 * jnp.mean(jnp.argmax(logits(params, data.test_images), axis=-1) == data.test_labels)
        return params, opt_state, accuracy, jnp.mean(correlation)

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    params, opt_state = jax.jit(jax.vmap(start))(keys)
    train_epochs = jax.jit(jax.vmap(train_epoch, in_axes=(0, None, 0, 0, None)), donate_argnums=(2, 3))
    data = jax.tree.map(jnp.asarray, data)
    accuracies, correlations = [], []
    for epoch in range(1, config.epochs + 1):
        params, opt_state, accuracy, correlation = train_epochs(keys, epoch, params, opt_state, data)
        accuracies.append(np.asarray(accuracy))
        correlations.append(np.asarray(correlation))
        on_epoch(accuracies[-1].mean())
    report = jax.tree.map(np.mean, jax.vmap(agent_optax.diagnostics)(opt_state))
    return Curves(np.stack(accuracies), np.stack(correlations), report["sparsity"], report["exploration_rate"])


def epochs_to(target: float, curve: np.ndarray) -> float:
    """Where a curve first reaches the target, by linear interpolation between epochs; nan if it never does."""
    reached = np.flatnonzero(curve >= target)
    if not len(reached) or reached[0] == 0:
        return 1.0 if len(reached) else np.nan
    i = reached[0]
    return i + (target - curve[i - 1]) / (curve[i] - curve[i - 1])


def spread(accuracy: np.ndarray) -> str:
    """The mean over epochs [E] and seeds [S], and the standard deviation over the seeds."""
    of_seeds = accuracy.mean(axis=0)
    return f"{of_seeds.mean():.2f} ± {of_seeds.std(ddof=1):.2f}"


def paired_difference(accuracy: np.ndarray, baseline: np.ndarray) -> str:
    """The mean over epochs [E] and seeds [S] of the difference, and its 95% interval by Student's t over the seeds."""
    of_seeds = np.mean(accuracy - baseline, axis=0)
    margin = scipy.stats.t.ppf(0.975, len(of_seeds) - 1) * scipy.stats.sem(of_seeds)
    return f"{of_seeds.mean():+.2f} ± {margin:.2f}" if of_seeds.any() else "-"


def result_table(results: dict[str, Curves], methods: dict[str, Method], config: Config) -> rich.table.Table:
    """One column a method."""
    baseline = results["SGD"].accuracy
    target = baseline[-3:].mean()  # a single epoch's accuracy would be noise
    half = config.epochs // 2
    columns = {}
    for name, curves in results.items():
        needed, gradients = epochs_to(target, curves.accuracy.mean(axis=1)), methods[name].gradients
        columns[name] = [
            (f"epochs 1-{half}", spread(curves.accuracy[:half])),
            ("  minus SGD", paired_difference(curves.accuracy[:half], baseline[:half])),
            (f"epochs {half + 1}-{config.epochs}", spread(curves.accuracy[half:])),
            ("  minus SGD", paired_difference(curves.accuracy[half:], baseline[half:])),
            (f"epochs to {target:.2f}", "never" if np.isnan(needed) else f"{needed:.1f}"),
            ("gradients/epoch", f"{gradients:.3g}"),
            ("gradients to that", "never" if np.isnan(needed) else f"{needed * gradients:.1f}"),
            ("mean correlation", f"{curves.correlation.mean():.2f}" if methods[name].corrects else "-"),
            ("sparsity", f"{curves.sparsity:.4%}"),
            ("explored (R_s)", f"{curves.exploration:.2%}"),
        ]
    table = rich.table.Table(
        title=f"Test accuracy in % on {config.dataset}, {config.seeds} seeds",
        caption="Accuracy: mean ± standard deviation over seeds. Minus SGD: mean difference, seed by seed, ± 95% "
        f"interval. {target:.2f}: SGD over its last {len(baseline[-3:])} epochs. Gradients: passes over the training "
        "images, a loss alone counting a third.",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", min_width=12)
    for row in zip(*columns.values(), strict=True):
        table.add_row(row[0][0], *(cell for _, cell in row))
    return table


def plot(results: dict[str, Curves], config: Config) -> None:
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    accuracy_axes, correlation_axes = figure.subplots(1, 2)
    epochs = np.arange(1, config.epochs + 1)
    for name, curves in results.items():
        for axes, values in ((accuracy_axes, curves.accuracy), (correlation_axes, curves.correlation)):
            mean, deviation = values.mean(axis=1), values.std(axis=1, ddof=1)
            axes.plot(epochs, mean, label=name)
            axes.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.15, linewidth=0)
    means = [curves.accuracy.mean(axis=1) for curves in results.values()]
    accuracy_axes.axhline(results["SGD"].accuracy[-3:].mean(), color="grey", linestyle=":", linewidth=1)
    accuracy_axes.set_ylim(np.percentile(means, 5) - 2, np.max(means) + 1)  # the first steps are not in question
    accuracy_axes.set(ylabel="test accuracy, %", title=f"{config.dataset}, {config.sparsity:.0%} sparse")
    accuracy_axes.legend(frameon=False, loc="lower right")
    correlation_axes.set(ylabel="c, before scaling", title="correlation with the old gradient", ylim=(-0.02, 1.02))
    for axes in (accuracy_axes, correlation_axes):
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
    config.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.plot, dpi=120)


def main(config: Config) -> None:
    console = rich.console.Console()
    try:
        config = config.completed()
        data = load(config)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    methods = METHODS | (LARGE_BATCH if config.large_batch else {})
    console.print(f"{config.dataset}: {len(data.train_images)} images for training, {len(data.test_images)} for tests")
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[accuracy]}"))
    results = {}
    with rich.progress.Progress(*columns, console=console) as progress:
        for name, method in methods.items():
            task = progress.add_task(name, total=config.epochs, accuracy="compiling")

            def show(accuracy: float, task: rich.progress.TaskID = task) -> None:
                progress.update(task, advance=1, accuracy=f"{accuracy:.1f}%")

            results[name] = train(method, config, data, show)
    console.print(result_table(results, methods, config))
    plot(results, config)
    console.print(f"Curves: {config.plot}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
