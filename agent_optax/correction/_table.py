"""The table memory: SAGA's gradient of each batch, as it was when the batch was last seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import keep_finite, statistics_dtype
from agent_optax._validation import check_positive_int
from agent_optax.correction._gradient_regression import GradientRegression, gradient_regression
from agent_optax.correction._memory import Recalled
from agent_optax.correction._rows import current_row, empty_rows, put_row, take_row


class TableState(NamedTuple):
    """State of `table`; N is the number of batches.

    Ages count steps. They tell, for every entry and whatever the order of batches, whether a row was written since
    the entry began. A weight that grows begins anew, with age 0 and sum 0; what its rows hold from before counts as
    zero, so that they need not be cleared, which would cost as much as a pass over the table.
    """

    table_grads: optax.Updates  # like params with a leading axis [N]: the gradient of each batch when last seen
    table_sum: optax.Updates  # like params, at least float32: the sum of table_grads over batches
    entry_age: optax.Params  # like params, int32: steps since the entry began
    row_age: jax.Array  # int32 [N]: steps since the row was written; -1: never written
    row_loss: jax.Array  # float [N]: the loss of each batch when last seen; nan: never told

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The row of this batch, and the mean over the rows written so far."""
        del grads
        index, is_row = current_row(extra_args, self.row_age.shape[0], f"table({self.row_age.shape[0]})")
        num_written = jnp.maximum(jnp.sum(self.row_age >= 0), 1)
        oldest = jnp.max(self.row_age)

        def mean(total: jax.Array, age: jax.Array, row: jax.Array) -> jax.Array:
            return jnp.where(age > oldest, total / num_written, row)

        row = self.written_row(index)
        return Recalled(
            old_grads=row,
            mean_grads=jax.tree.map(mean, self.table_sum, self.entry_age, row),
            is_known=is_row & (self.row_age[index] >= 0),
            old_loss=self.row_loss[index],
        )

    def written_row(self, index: jax.Array) -> optax.Updates:
        """A row, with zero for the entries that began after it was written."""
        return jax.tree.map(
            lambda row, age: jnp.where(age > self.row_age[index], row, 0),
            take_row(self.table_grads, index),
            self.entry_age,
        )

    def dense_fields(self) -> tuple[str, ...]:
        """The fields that `sparsify` leaves alone under dense storage: the ages know which rows count."""
        return ("table_grads",)


@dataclasses.dataclass(frozen=True)
class Table:
    """See `table`."""

    num_batches: int

    def init(self, params: optax.Params) -> TableState:
        """No batch has been seen."""
        dtype = statistics_dtype(params)
        return TableState(
            table_grads=empty_rows(params, self.num_batches),
            table_sum=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params),
            entry_age=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int32), params),
            row_age=jnp.full((self.num_batches,), -1, jnp.int32),
            row_loss=jnp.full((self.num_batches,), jnp.nan, dtype),
        )

    def remember(
        self,
        memory_state: TableState,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> TableState:
        """Writes the row of this batch; entries that are not finite, even when summed, are passed over."""
        del corrected, params
        state = memory_state
        index, is_row = current_row(extra_args, self.num_batches, f"table({self.num_batches})")
        old_row = state.written_row(index)

        def write(grad: jax.Array, old: jax.Array, total: jax.Array) -> jax.Array:
            is_usable = is_row & jnp.isfinite(grad.astype(total.dtype) * self.num_batches)
            return jnp.where(is_usable, grad.astype(old.dtype), old)

        row = jax.tree.map(write, grads, old_row, state.table_sum)

        def replace(total: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
            return total + (new.astype(total.dtype) - old.astype(total.dtype))

        row_age = jnp.where(state.row_age >= 0, state.row_age + 1, -1)
        loss = jnp.asarray(extra_args.get("value", jnp.nan), state.row_loss.dtype)
        old_loss = state.row_loss[index]
        return TableState(
            table_grads=put_row(state.table_grads, row, index),
            table_sum=jax.tree.map(replace, state.table_sum, row, old_row),
            entry_age=jax.tree.map(lambda age: age + 1, state.entry_age),
            row_age=row_age.at[index].set(jnp.where(is_row, 0, row_age[index])),
            row_loss=state.row_loss.at[index].set(jnp.where(is_row, keep_finite(loss, old_loss), old_loss)),
        )

    def default_coefficient(self) -> GradientRegression:
        """A coefficient that needs nothing but gradients."""
        return gradient_regression()


def table(num_batches: int) -> Table:
    r"""The memory of SAGA: the gradient of each batch as it was when the batch was last seen.

    .. math::
        g_{old} = T_i, \qquad g_{mean} = \frac{1}{|S|} \sum_{j \in S} T_j, \qquad
        \text{then} \quad T_i \leftarrow g_{new}

    for the i-th of N fixed batches, S being the batches seen so far. A step needs one gradient and no pass over the
    data; `update` takes i as the extra argument ``batch_index=``, an int or a traced integer scalar. The batches must
    be the same in each epoch, in any order.

    A batch that was never seen is not corrected: in the first epoch, nothing is. A weight that `sparsify` grows is
    corrected when every batch of S has been seen since, and not before. Entries of a gradient that are not finite
    leave the row as it is; a traced `batch_index` out of range corrects nothing and writes nothing. `loss_regression`
    is fed step by step, with the loss of the batch when it was last seen.

    The state holds N gradients, and two numbers a weight (float32 and int32).

    Args:
        num_batches: N, the batches of an epoch, at least 1.

    Returns:
        A memory for `agent_optax.correct_gradients`.

    Raises:
        ValueError: if `num_batches` is not a positive whole number; from `update`, if `batch_index` is missing, not
            an integer, or known to be out of range.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> tx = agent_optax.correct_gradients(agent_optax.table(2), agent_optax.constant(1.0), scaling=1.0)
        >>> state = tx.init(jnp.zeros(1))
        >>> for index, grad in [(0, 4.0), (1, 8.0), (0, 5.0)]:
        ...     estimate, state = tx.update(jnp.asarray([grad]), state, batch_index=index)
        >>> float(estimate[0])  # 5 - (4 - (4 + 8) / 2)
        7.0

    References:
        Defazio, Bach & Lacoste-Julien, SAGA: A Fast Incremental Gradient Method With Support for Non-Strongly Convex
        Composite Objectives, NeurIPS 2014.
    """
    check_positive_int("num_batches", num_batches, "it is the number of batches of an epoch, each with a row")
    return Table(num_batches)
