"""The state of a sparse optimizer, and what can be read off it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, SequenceKey

from agent_optax._tree import is_masked
from agent_optax.correction._find import CorrectionWrapper, StorageView
from agent_optax.sparsity._leaf_names import path_name


class _SparsifyFields(NamedTuple):
    inner_state: optax.OptState  # of the inner optimizer
    active_weights: Any  # of the storage, an ActiveWeights: which weights are active
    topology_state: Any  # of the topology; () where it keeps nothing
    num_prunable: jax.Array  # float32 []: weights in pruned leaves, active or not
    topology_key: jax.Array  # uint32 [...]: key data
    topology_step: jax.Array  # int32 []: steps taken
    num_dropped: jax.Array  # int32 []: weights that became inactive in the last topology update
    num_grown: jax.Array  # int32 []: weights that became active in it
    num_nonzero_inactive: jax.Array  # int32 []: inactive weights that were not zero at the last topology update
    num_topology_updates: jax.Array  # int32 []: topology updates made
    num_skipped_updates: jax.Array  # int32 []: topology updates skipped because a gradient or weight was not finite


class SparsifyState(_SparsifyFields, CorrectionWrapper):
    """State of `sparsify`."""

    __slots__ = ()

    def active_masks(self, params: optax.Params) -> Any:
        """The masks like `params`, bool; MaskedNode where nothing is pruned."""
        return self.active_weights.masks(params)

    def sparsity(self) -> jax.Array:
        """The share of inactive weights."""
        return 1 - self.active_weights.num_active() / self.num_prunable

    def exploration_rate(self) -> jax.Array:
        """R_s, the share of weights that were ever active."""
        return self.active_weights.num_ever_active() / self.num_prunable

    def storage_view(self) -> StorageView:
        """How the inner state stores parameters."""
        return self.active_weights

    def points_moved(self) -> SparsifyState:
        """After the memories in the inner state have moved to the current parameters."""
        return self._replace(active_weights=self.active_weights.points_moved())


def apply_masks(masks: Any, params: optax.Params) -> optax.Params:
    """Exact zeros where a mask is False."""
    return jax.tree.map(
        lambda mask, p: p if is_masked(mask) else jnp.where(mask, p, jnp.zeros_like(p)),
        masks,
        params,
        is_leaf=is_masked,
    )


def total(counts: Any) -> jax.Array:
    """The sum of the int32 scalars in a tree."""
    return sum(jax.tree.leaves(counts), jnp.zeros((), jnp.int32))


def large_total(counts: Any) -> jax.Array:
    """The sum of the int32 scalars in a tree as a float32, for sums that may exceed 2^31: halves are added up apart."""
    counts = [jnp.asarray(count, jnp.int32) for count in jax.tree.leaves(counts)]
    high, low = (total([half(count) for count in counts]) for half in (lambda n: n >> 16, lambda n: n & 0xFFFF))
    return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32)


def find_sparsify(opt_state: optax.OptState) -> list[SparsifyState]:
    """All sparse optimizers in a state."""
    return [state for _, state in _with_paths(opt_state)]


def named_sparsify(opt_state: optax.OptState) -> dict[str, SparsifyState]:
    """All sparse optimizers in a state, by as short a name as tells them apart.

    That is the label in `optax.partition`, ``"actor"``, or with places in chains and other tuples, ``"actor/0"``, or
    the whole path with the names of fields.
    """
    found, names = _with_paths(opt_state), list[str]()
    for kinds in ((DictKey,), (DictKey, SequenceKey), (object,)):
        names = [path_name(tuple(key for key in path if isinstance(key, kinds))) for path, _ in found]
        if len(set(names)) == len(names) and "" not in names:
            break
    return {name: state for name, (_, state) in zip(names, found, strict=True)}


def _with_paths(opt_state: optax.OptState) -> list[tuple[tuple[Any, ...], SparsifyState]]:
    def is_sparsify(node: Any) -> bool:
        return isinstance(node, SparsifyState)

    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_sparsify)
    return [(path, node) for path, node in nodes if is_sparsify(node)]
