"""Trains a sparse MLP on digits with AGENT, one program on each of several hosts.

Each process reads its own share of the images; parameters are split over all devices. Kill any process at any time and
start all of them again with the same command: they go on from the last checkpoint, and end with the numbers of a run
that was never interrupted.

    srun --ntasks=4 python examples/multihost.py        # under SLURM processes find each other

    # by hand, one line in each of two terminals or on each of two hosts
    python examples/multihost.py --coordinator localhost:1234 --num-processes 2 --process-id 0
    python examples/multihost.py --coordinator localhost:1234 --num-processes 2 --process-id 1
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from data import ImageData, load_digits, standardise
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import agent_optax

HIDDEN, NUM_CLASSES = 256, 10


@dataclasses.dataclass(frozen=True)
class Config:
    coordinator: str | None = None
    """Address and port of process 0, such as host:1234. Default: what SLURM says; without SLURM, a single process."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: int = 100
    """Seconds after which a process that says nothing any more is given up, and the others end with an error."""
    epochs: int = 10
    batch_size: int = 64
    """Of all processes together."""
    learning_rate: float = 0.1
    sparsity: float = 0.9
    seed: int = 0
    checkpoint_dir: Path | None = None
    """A folder that all hosts see. Default: no checkpoints."""


def join(config: Config) -> None:
    """Finds the other processes; must come before anything else that JAX does."""
    given = (config.coordinator, config.num_processes, config.process_id)
    if any(x is not None for x in given) and any(x is None for x in given):
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together, "
            f"got {config.coordinator}, {config.num_processes}, {config.process_id}"
        )
    # On a CPU, programs that run beside each other meet their other halves in any order, and may wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    timeout = {"heartbeat_timeout_seconds": config.heartbeat_timeout}
    if config.coordinator is not None:
        jax.distributed.initialize(*given, **timeout)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize(**timeout)


def local_batches(data: ImageData, config: Config, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's part of each batch of an epoch: every n-th of the images, shuffled anew in each epoch.

    The order is made of the seed and the epoch only, so a run that goes on after a checkpoint reads what it would have.
    """
    images, labels, rank, n = data.train_images, data.train_labels, jax.process_index(), jax.process_count()
    usable = len(images) - len(images) % config.batch_size
    order = grain.MapDataset.range(len(images)).shuffle(seed=config.seed * 1000 + epoch)[:usable]
    own = order[rank::n].batch(config.batch_size // n, drop_remainder=True)
    return ((images[indices], labels[indices]) for indices in own)


def global_batches(data: ImageData, config: Config, epoch: int, mesh: Mesh) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The same as arrays that are split over the devices of all processes."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for batch in local_batches(data, config, epoch):
        yield tuple(jax.make_array_from_process_local_data(sharding, part) for part in batch)


def init_params(key: jax.Array, num_pixels: int, mesh: Mesh) -> optax.Params:
    """Kernels split over devices by their rows, if they divide; the rest whole on each."""
    shapes = {"hidden": (num_pixels, HIDDEN), "output": (HIDDEN, NUM_CLASSES)}

    def start(key: jax.Array) -> optax.Params:
        he = jax.nn.initializers.he_normal()
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {name: {"kernel": he(keys[name], s), "bias": jnp.zeros(s[1])} for name, s in shapes.items()}

    def layout(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        splits = leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec("data") if splits else PartitionSpec())

    return jax.jit(start, out_shardings=jax.tree.map(layout, jax.eval_shape(start, key)))(key)


def on_all_devices(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """Counters and the like, which start on one device; a restored one would be bound to it."""
    whole = NamedSharding(mesh, PartitionSpec())
    return leaf if leaf.sharding.device_set == whole.device_set else jax.device_put(leaf, whole)


def logits_of(params: optax.Params, images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, batch[0]), batch[1]).mean()


def optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    correction = agent_optax.correct_gradients(coefficient=agent_optax.gradient_regression(), scaling=1.0)
    sgd = optax.sgd(config.learning_rate, momentum=0.9, nesterov=True)
    inner = optax.chain(correction, optax.add_decayed_weights(5e-4), sgd)
    topology = agent_optax.rigl(update_every=steps_per_epoch // 2)
    return agent_optax.sparsify(inner, topology, sparsity=config.sparsity, key=config.seed)


def digest(tree: Any, mesh: Mesh) -> str:
    """A few letters that are equal on all processes exactly when the arrays are."""
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(whole)]
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:12]


def train(config: Config) -> None:
    data = standardise(load_digits())
    steps_per_epoch = len(data.train_images) // config.batch_size
    if config.batch_size % jax.device_count() or steps_per_epoch < 2:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a multiple of the {jax.device_count()} devices, and at most "
            f"half of the {len(data.train_images)} images"
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    tx = optimizer(config, steps_per_epoch)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        (value, grads), extras = agent_optax.value_and_grads(loss_fn)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extras)
        return optax.apply_updates(params, updates), opt_state, value

    @jax.jit
    def accuracy(params: Any, images: Any, labels: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(logits_of(params, images), -1) == labels)

    @jax.jit
    def describe(opt_state: Any, params: Any) -> Any:
        return agent_optax.diagnostics(opt_state), agent_optax.active_masks(opt_state, params)

    params = init_params(jax.random.key(config.seed), data.train_images.shape[1], mesh)
    opt_state = tx.init(params)  # not under jit: there the compiler would not know which zeros to split, and where
    opt_state = jax.tree.map(lambda leaf: on_all_devices(leaf, mesh), opt_state)
    params = jax.jit(agent_optax.mask_params)(params, opt_state)

    first_epoch, manager = 0, None
    if config.checkpoint_dir is not None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(config.checkpoint_dir.absolute(), options=options)
        if manager.latest_step() is not None:
            first_epoch = manager.latest_step()
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, opt_state))
            params, opt_state = manager.restore(first_epoch, args=ocp.args.StandardRestore(like))
            print(f"process {jax.process_index()}: goes on after epoch {first_epoch}", flush=True)

    for epoch in range(first_epoch, config.epochs):
        # Each process evaluates its own share of each batch; the mean gradient is that over all of them.
        opt_state = agent_optax.refresh(loss_fn, params, opt_state, global_batches(data, config, epoch, mesh))
        for batch in global_batches(data, config, epoch, mesh):
            params, opt_state, value = step(params, opt_state, batch)
        report, masks = describe(opt_state, params)
        masks = digest(masks, mesh)
        print(
            f"process {jax.process_index()}: epoch {epoch + 1}: loss {value:.6f}, "
            f"test accuracy {100 * accuracy(params, data.test_images, data.test_labels):.2f}%, "
            f"correlation {report['correlation']:.4f}, sparsity {100 * report['sparsity']:.2f}%, masks {masks}",
            flush=True,
        )
        if manager is not None:
            manager.save(epoch + 1, args=ocp.args.StandardSave((params, opt_state)))
    if manager is not None:
        manager.wait_until_finished()
    print(f"process {jax.process_index()}: parameters and state {digest((params, opt_state), mesh)}", flush=True)


def main(config: Config) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    join(config)
    train(config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
