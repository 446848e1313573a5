"""Exact selection of the k largest scores, with reductions only."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def top_k_mask(scores: jax.Array, k: int | jax.Array) -> jax.Array:
    r"""A mask of the k largest scores: exactly k True, ties to the lowest flat index, no sort.

    The k-th largest value is searched for between bounds on the bits of the scores, mapped to integers of the same
    order; each step of the search is one count over the array. So the cost hardly depends on k, nothing is gathered or
    sorted, and on a sharded array only scalars cross the wire.

    Args:
        scores: [...] real numbers; nan ranks below everything else, -0.0 equals 0.0.
        k: how many to select, 0 <= k <= scores.size; may be traced.

    Returns:
        bool [...], with exactly k entries True.

    Raises:
        ValueError: if `k` is a plain number outside 0 .. scores.size.
        TypeError: if `k` is no whole number, or scores are complex.

    Example:
        >>> import agent_optax, jax.numpy as jnp
        >>> agent_optax.top_k_mask(jnp.array([3.0, 1.0, 3.0, 2.0]), 2)
        Array([ True, False,  True, False], dtype=bool)
    """
    scores = jnp.asarray(scores)
    if jnp.issubdtype(scores.dtype, jnp.complexfloating):
        raise TypeError(f"scores must be real, got dtype {scores.dtype}: select by jnp.abs(scores).")
    if jnp.ndim(k) or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"k must be a whole number, got {k!r}: it is how many to select.")
    if not isinstance(k, jax.Array) and not 0 <= k <= scores.size:
        raise ValueError(f"k must lie between 0 and the number of scores, {scores.size}, got {k!r}.")
    return select(scores, k)


def select(scores: jax.Array, k: int | jax.Array, candidates: jax.Array | None = None) -> jax.Array:
    """`top_k_mask` among the candidates, of which there must be at least k."""
    return select_jointly([scores], k, None if candidates is None else [candidates])[0]


@functools.partial(jax.jit, inline=True)  # else `init` outside any jit would compile loops anew each time
def select_jointly(
    scores: Sequence[jax.Array], k: int | jax.Array, candidates: Sequence[jax.Array] | None = None
) -> list[jax.Array]:
    """Masks of the k largest scores of several arrays together; ties to the first array, the lowest flat index."""
    dtype = jnp.result_type(*scores)
    ranks = [_ranks(s.astype(dtype)) for s in scores]
    if candidates is not None:
        ranks = [jnp.where(c, r, 0) for c, r in zip(candidates, ranks, strict=True)]
    k = jnp.asarray(k, jnp.int32)
    threshold, num_above = _kth_largest(ranks, k)
    above, tied = [r > threshold for r in ranks], [r == threshold for r in ranks]
    if candidates is not None:
        tied = [t & c for t, c in zip(tied, candidates, strict=True)]
    missing = k - num_above
    masks = []
    for a, t in zip(above, tied, strict=True):
        taken = jnp.minimum(missing, num_true(t)) if len(above) > 1 else missing
        masks.append(a | (t & _first(t, taken)))
        missing = missing - taken
    return masks


def select_from_all(
    scores: Sequence[jax.Array], k: int | jax.Array, candidates: Sequence[jax.Array]
) -> list[jax.Array]:
    """Masks of the k largest scores of several arrays together, but at least one of each array that has candidates."""
    safe = [_largest(s, c) for s, c in zip(scores, candidates, strict=True)]
    rest = jnp.maximum(jnp.asarray(k, jnp.int32) - num_true(*safe), 0)
    others = select_jointly(scores, rest, [c & ~s for c, s in zip(candidates, safe, strict=True)])
    return [s | o for s, o in zip(safe, others, strict=True)]


def _largest(scores: jax.Array, candidates: jax.Array) -> jax.Array:
    """A mask of the largest candidate, the first of equal ones: two reductions, and no loop to compile."""
    ranks = jnp.where(candidates, _ranks(scores), 0)
    tied = candidates & (ranks == jnp.max(ranks))
    position = jnp.arange(scores.size, dtype=jnp.int32).reshape(scores.shape)
    return position == jnp.min(jnp.where(tied, position, scores.size))


def random_scores(key: jax.Array, like: jax.Array) -> jax.Array:
    """A uniform random number for each entry of `like`, sharded as `like` is."""
    return jnp.zeros_like(like, dtype=jnp.uint32) | jax.random.bits(key, jnp.shape(like), jnp.uint32)


def _ranks(scores: jax.Array) -> jax.Array:
    """Unsigned integers of the same width in the order of the scores."""
    if scores.dtype == bool:
        return scores.astype(jnp.uint8)
    if jnp.issubdtype(scores.dtype, jnp.unsignedinteger):
        return scores
    word = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    sign = jnp.asarray(1 << (jnp.iinfo(word).bits - 1), word)
    bits = jax.lax.bitcast_convert_type(scores, word)
    if jnp.issubdtype(scores.dtype, jnp.signedinteger):
        return bits ^ sign
    bits = jnp.where(bits == sign, 0, bits)  # -0.0, told by its bits: to XLA on a CPU subnormal numbers equal 0 too
    return jnp.where(jnp.isnan(scores), 0, jnp.where(bits & sign != 0, ~bits, bits | sign)).astype(word)


def num_true(*masks: jax.Array) -> jax.Array:
    """int32: how many entries of the masks are True."""

    def number(mask: jax.Array) -> jax.Array:
        # XLA on a CPU adds floats twice as fast as integers, and whole ones exactly up to 2^24.
        dtype = jnp.float32 if mask.size <= 2**24 else jnp.int32
        return jnp.sum(mask, dtype=dtype).astype(jnp.int32)

    return functools.reduce(jnp.add, map(number, masks))


def _kth_largest(ranks: Sequence[jax.Array], k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least t with at most k ranks above it, or any t with exactly k above it; and how many are above.

    The bracket lo < t <= hi is cut where the counts at its ends suggest: as if the log-odds of being above fell
    evenly, which suits the tails of weights and gradients, and in the next iteration as if the counts did, which suits
    random numbers. That takes about ten counts; every third cut halves the bracket, so their number is bounded
    whatever the ranks are.
    """
    word = ranks[0].dtype
    real = jnp.float64 if word == jnp.uint64 else jnp.float32
    top = jnp.asarray(jnp.iinfo(word).max, word)
    above_zero = num_true(*(r > 0 for r in ranks))
    zero = jnp.minimum(above_zero, 0)  # depends on the count, so that the buffer of the count can be reused
    nothing = zero.astype(word)
    least = functools.reduce(jnp.minimum, [jnp.min(jnp.where(r > nothing, r, top), initial=top) for r in ranks])
    largest = functools.reduce(jnp.maximum, [jnp.max(r, initial=0) for r in ranks])

    num_candidates = above_zero.astype(real)

    def log_odds(above):
        return jnp.log((above + 0.5) / (num_candidates - above + 0.5))

    def is_open(bracket):
        _, lo, hi, above_lo, _ = bracket
        return (above_lo > k) & (hi - lo > 1)

    def cut(bracket):
        iteration, lo, hi, above_lo, above_hi = bracket
        width = hi - lo

        def share(scale):
            at_lo, at_hi, at_k = (scale(n.astype(real)) for n in (above_lo, above_hi, k))
            return (at_lo - at_k) / (at_lo - at_hi)

        by_odds, by_counts = share(log_odds), share(lambda above: above)
        suggested = jnp.minimum(jnp.where(iteration % 3 == 0, by_odds, by_counts), 1 - 1e-6)
        suggested = (width.astype(real) * suggested).astype(word)
        step = jnp.clip(jnp.where(iteration % 3 == 2, width // 2, suggested), 1, width - 1)
        at = lo + step
        above = num_true(*(r > at for r in ranks))
        enough = above >= k
        return (
            iteration + 1,
            jnp.where(enough, at, lo),
            jnp.where(enough, hi, at),
            jnp.where(enough, above, above_lo),
            jnp.where(enough, above_hi, above),
        )

    lo = jnp.where(above_zero > k, least - 1, 0).astype(word)
    _, lo, hi, above_lo, above_hi = jax.lax.while_loop(is_open, cut, (zero, lo, largest, above_zero, zero))
    return jnp.where(above_lo > k, hi, lo), jnp.where(above_lo > k, above_hi, above_lo)


def _first(tied: jax.Array, n: jax.Array) -> jax.Array:
    """A mask of the flat positions up to the n-th True of `tied`; everything when n is all of them."""
    bits = max(tied.size - 1, 1).bit_length()
    takes_all = num_true(tied) == n

    def body(i, last):  # the largest position with fewer than n ties before it
        candidate = last | (1 << (bits - 1 - i))
        return jnp.where(num_true(tied & _is_before(candidate, tied.shape)) < n, candidate, last)

    # No iteration, rather than a conditional: under jax.vmap that would compute both branches for every array.
    last = jax.lax.fori_loop(0, jnp.where(takes_all, 0, bits), body, jnp.zeros_like(n))
    return _is_before(jnp.where(takes_all, tied.size, last + 1), tied.shape) & (n > 0)


def _is_before(end: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """True at the flat positions below `end`.

    Axis by axis, never as an array of positions, which XLA would move out of a loop and keep.
    """
    if not shape:
        return end > 0
    before = jnp.zeros(shape, bool)
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        bound = end // math.prod(shape[axis + 1 :])
        bound = bound % shape[axis] if axis else bound
        before = (place < bound) | ((place == bound) & before)
    return before
