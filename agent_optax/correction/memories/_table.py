"""The table memory: SAGA's gradient of each batch, as it was when the batch was last seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agent_optax._tree import statistics_dtype, wide_dtype, zero_like
from agent_optax._validation import check_positive_int
from agent_optax.correction._memory import MemoryState, Recalled, passed_loss
from agent_optax.correction.coefficients._gradient_regression import GradientRegression, gradient_regression
from agent_optax.correction.memories._rows import current_row, empty_rows, look_up, put_row, take_row


class _TableFields(NamedTuple):
    table_grads: optax.Updates  # like params with a leading axis [N + 1]: a gradient of each batch, and a free place
    table_sum: optax.Updates  # like params, at least float32: the sum of the rows that count
    entry_age: optax.Params  # like params, int32: steps since the entry began
    row_place: jax.Array  # int32 [N]: the place of the row of each batch
    free_place: jax.Array  # int32 []: the place that holds no row
    row_age: jax.Array  # int32 [N]: steps since the row was written; -1: never written
    row_loss: jax.Array  # float [N]: the loss of each batch when last seen
    has_row_loss: jax.Array  # bool [N]: whether a `value` was ever passed with the batch


class TableState(_TableFields, MemoryState):
    """State of `table`; N is the number of batches.

    A new row is written to the free place, and the place of the old row becomes free: XLA then writes in place, where
    it would copy the whole table if a row were read and overwritten in one step.

    Ages count steps. They tell, for every entry and whatever the order of batches, whether a row was written since
    the entry began. An entry begins anew, with age 0 and sum 0, when its weight grows or its gradient is not finite.
    What its rows hold from before does not count, so nothing has to clear them.
    """

    __slots__ = ()

    def recall(self, grads: optax.Updates, extra_args: Mapping[str, Any]) -> Recalled:
        """The row of this batch, and the mean over the rows written so far.

        Writes the new row as well, and reads what it recalls off the arrays after that: arrays that are read both
        before and after they are overwritten would be copied.
        """
        num_batches = self.row_age.shape[0]
        index, is_row = current_row(extra_args, num_batches, f"table({num_batches})")
        num_written = jnp.maximum(jnp.sum(self.row_age >= 0), 1)
        age_of_row, oldest = look_up(self.row_age, index), jnp.max(self.row_age)

        def is_usable(grad: jax.Array, total: jax.Array) -> jax.Array:
            return jnp.isfinite(grad.astype(total.dtype) * num_batches)  # finite even when summed over the table

        usable = jax.tree.map(is_usable, grads, self.table_sum)
        new_row = jax.tree.map(
            lambda g, row, ok: jnp.where(ok, g, 0).astype(row.dtype), grads, self.table_grads, usable
        )
        table_grads = put_row(self.table_grads, new_row, self.free_place)
        entry_age = jax.tree.map(lambda age, ok: jnp.where(ok, age + 1, 0), self.entry_age, usable)
        old_row = jax.tree.map(
            lambda row, age: jnp.where(age > age_of_row + 1, row, 0),
            take_row(table_grads, look_up(self.row_place, index)),
            entry_age,
        )
        change = jax.tree.map(
            lambda new, old, total: jnp.where(is_row, new.astype(total.dtype) - old.astype(total.dtype), 0),
            new_row,
            old_row,
            self.table_sum,
        )
        table_sum = jax.tree.map(lambda total, d, ok: jnp.where(ok, total + d, 0), self.table_sum, change, usable)

        def mean(total: jax.Array, d: jax.Array, age: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(age > oldest + 1, (total - d) / num_written.astype(total.dtype), old.astype(total.dtype))

        return Recalled(
            old_grads=old_row,
            mean_grads=jax.tree.map(mean, table_sum, change, entry_age, old_row),
            is_known=is_row & (age_of_row >= 0),
            old_loss=look_up(self.row_loss, index),
            is_old_loss_known=jnp.any(self.has_row_loss & (jnp.arange(num_batches) == index)),
            written=self._replace(table_grads=table_grads, table_sum=table_sum, entry_age=entry_age),
        )

    def dense_fields(self) -> tuple[str, ...]:
        """The ages tell which rows count."""
        return ("table_grads",)


@dataclasses.dataclass(frozen=True)
class Table:
    """See `table`."""

    num_batches: int

    def init(self, params: optax.Params) -> TableState:
        """No batch has been seen."""
        zero = zero_like(params, jnp.int32)
        return TableState(
            table_grads=empty_rows(params, self.num_batches + 1),
            table_sum=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p.dtype)), params),
            entry_age=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int32), params),
            row_place=zero + jnp.arange(self.num_batches, dtype=jnp.int32),
            free_place=zero + self.num_batches,
            row_age=jnp.broadcast_to(zero - 1, (self.num_batches,)),
            row_loss=jnp.broadcast_to(zero.astype(statistics_dtype(params)), (self.num_batches,)),
            has_row_loss=jnp.broadcast_to(zero.astype(bool), (self.num_batches,)),
        )

    def remember(
        self,
        memory_state: TableState,
        recalled: Recalled,
        grads: optax.Updates,
        corrected: optax.Updates,
        params: optax.Params | None,
        extra_args: Mapping[str, Any],
    ) -> TableState:
        """The new row takes the place of the old one."""
        del grads, corrected, params
        state = memory_state
        index, is_row = current_row(extra_args, self.num_batches, f"table({self.num_batches})")

        def set_row(values: jax.Array, new: jax.Array) -> jax.Array:
            return values.at[index].set(jnp.where(is_row, new, values[index]))

        loss = passed_loss(extra_args, state.row_loss[index])
        return recalled.written._replace(
            row_place=set_row(state.row_place, state.free_place),
            free_place=jnp.where(is_row, look_up(state.row_place, index), state.free_place),
            row_age=set_row(jnp.where(state.row_age >= 0, state.row_age + 1, -1), jnp.zeros((), jnp.int32)),
            row_loss=set_row(state.row_loss, loss.number),
            has_row_loss=set_row(state.has_row_loss, loss.is_known | state.has_row_loss[index]),
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
    corrected when every batch of S has been seen since, and not before; so is a weight whose gradient was not finite.
    A traced `batch_index` out of range corrects nothing and writes nothing. `loss_regression` is fed step by step, with
    the loss of the batch when it was last seen.

    The state holds N + 1 gradients, and two numbers a weight (float32 and int32).

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
