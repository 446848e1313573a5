"""Groups of weights of which a fixed number is active: what keeps a pattern through a topology update."""

from __future__ import annotations

import jax


class Groups:
    """A subclass says which masks keep the pattern: `best` is the best of them.

    Groups go through compiled loops with their layer, so a subclass is a frozen dataclass registered as static
    (`jax.tree_util.register_static`).
    """

    def best(
        self,
        scores: jax.Array,
        number: int | jax.Array,
        first: jax.Array | None = None,
        first_scores: jax.Array | None = None,
    ) -> jax.Array:
        """The mask that has the pattern and `number` active entries: those of `first`, then by falling score.

        Args:
            scores: by which entries are ranked, in the shape of a layer.
            number: of active entries in the layer; a pattern that fixes it does not look at it.
            first: bool: those that come before all others. Default: none.
            first_scores: by which those of `first` are ranked among themselves, should a group not take them all.
                Default: `scores`.
        """
        raise NotImplementedError
