"""What `sparsify` is made of: static through a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agent_optax._tree import is_masked
from agent_optax.sparsity._default_axes import AxesChoice
from agent_optax.sparsity._pattern import PatternChoice
from agent_optax.sparsity._pruned_leaf import PrunedLeaf, pruned_leaves
from agent_optax.sparsity._topology import Topology
from agent_optax.sparsity._where import check_sizes
from agent_optax.sparsity.inner._like_params import likely_extra_args, split_args
from agent_optax.sparsity.inner._traits import Traits, trace_update, traits_of

MAX_STUDIED = 64  # programs whose traits are kept


@dataclasses.dataclass(frozen=True, eq=False)
class SparseOptimizer:
    """An inner optimizer, and which weights it has."""

    inner: optax.GradientTransformationExtraArgs
    topology: Topology
    pattern: PatternChoice
    axes: AxesChoice
    grow_by: str
    stagger: bool
    studied: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def pruned_leaves(self, params: optax.Params, masks: Any) -> list[PrunedLeaf]:
        """The leaves that have a mask; ValueError where one cannot have its pattern, or the topology not keep it."""
        masked = [not is_masked(mask) for mask in jax.tree.structure(params).flatten_up_to(masks)]
        pruned = pruned_leaves(params, masked, self.pattern, self.axes)
        _check_topology(pruned, self.topology)
        return pruned

    def layers_due(self, step: jax.Array, num_layers: int) -> jax.Array:
        """Bool [num_layers]: which layers change at this step; staggered layers spread evenly over the interval."""
        delays = np.arange(num_layers) * self.topology.interval // max(num_layers, 1) * self.stagger
        return self.topology.is_due(step - delays)

    def traits(
        self,
        grads: optax.Updates,
        params: optax.Params,
        extra_args: dict[str, Any],
        pruned: Sequence[PrunedLeaf],
        exempt: str,
    ) -> Traits:
        """The traits of the inner optimizer for these arguments; looked at once for each kind of them."""
        numeric, others = split_args(extra_args)
        leaves, treedef = jax.tree.flatten((grads, params, numeric))
        kind = (
            treedef,
            tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves),
            tuple((name, id(others[name])) for name in sorted(others)),
            tuple(leaf.index for leaf in pruned),
            exempt,
        )
        if kind not in self.studied:
            traced = trace_update(self.inner, grads, params, extra_args)
            traits = traits_of(self.inner, traced, {leaf.index for leaf in pruned}, exempt)
            if len(self.studied) >= MAX_STUDIED:
                self.studied.clear()
            self.studied[kind] = traits, others  # which keeps the identities of `others` from being reused
        return self.studied[kind][0]

    def frozen_leaves(self, params: optax.Params, pruned: Sequence[PrunedLeaf]) -> list[PrunedLeaf]:
        """The pruned leaves that the inner optimizer never updates while it updates others, as far as init can know.

        Raises ValueError where the topology would have to reset states that cannot be told apart.
        """
        for extra_args in (likely_extra_args(params), {}):
            try:
                traits = self.traits(params, params, extra_args, pruned, exempt="dense_fields")
            except Exception:  # it needs arguments that only a step has
                continue
            if traits.is_flattened and not self.topology.is_static:
                raise ValueError(
                    "the inner optimizer keeps the state of all parameters in one row (optax.flatten), where "
                    f"{self.topology} cannot start the state of a grown weight again: use it without optax.flatten, or "
                    "with agent_optax.static()."
                )
            frozen = [leaf for leaf in pruned if leaf.index in traits.unchanged]
            return frozen if len(frozen) < len(pruned) else []
        return []


def _check_topology(pruned: Sequence[PrunedLeaf], topology: Topology) -> None:
    """Raises ValueError where the topology cannot keep a pattern, or count the weights."""
    for leaf in pruned:
        pattern = leaf.pattern
        if (pattern.has_groups and not topology.supports_groups) or (
            pattern.has_blocks and not topology.supports_blocks
        ):
            raise ValueError(
                f"pattern={pattern} cannot be kept by {topology}, which changes how many weights are active where: use "
                "another topology, such as agent_optax.rigl(), or no pattern."
            )
    check_sizes({leaf.name: math.prod(leaf.shape) for leaf in pruned}, topology.counts_jointly)
    units = {leaf.name: leaf.pattern.unit_size(leaf.layer_shape) for leaf in pruned}
    if topology.counts_jointly and len(set(units.values())) > 1:
        raise ValueError(
            f"{topology} trades blocks of one layer for blocks of another, which needs blocks of one size, but pattern="
            f" makes blocks of these numbers of weights: {units}. Use a topology that keeps to a layer."
        )
