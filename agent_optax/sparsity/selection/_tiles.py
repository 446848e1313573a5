"""An axis seen as tiles, also where it lies on several devices."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def split_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Splits an axis into two: [..., tiles, size, ...].

    With explicit sharding the tiles stay on their devices if each device has whole ones, a single tile is spread as
    the axis was, and anything else is gathered along this axis.
    """
    axis %= x.ndim
    number = x.shape[axis] // size
    shape = (*x.shape[:axis], number, size, *x.shape[axis + 1 :])
    spec = explicit_spec(x)
    if spec is None:
        return x.reshape(shape)
    names = spec[axis]
    devices = _num_devices(x, names)
    both = (None, names) if number == 1 else (names, None) if number % devices == 0 else (None, None)
    return jax.lax.reshape(x, shape, out_sharding=_like(x, (*spec[:axis], *both, *spec[axis + 1 :])))


def join_axes(x: jax.Array, like: jax.Array) -> jax.Array:
    """What `split_axis` made of an array shaped and laid out as `like`, whole again."""
    spec = explicit_spec(like)
    return x.reshape(like.shape) if spec is None else jax.lax.reshape(x, like.shape, out_sharding=_like(like, spec))


def reshape_after(x: jax.Array, num_kept: int, shape: tuple[int, ...]) -> jax.Array:
    """The axes after the first `num_kept` in this shape; with explicit sharding each device has them whole then."""
    shape = (*x.shape[:num_kept], *shape)
    spec = explicit_spec(x)
    if spec is None:
        return x.reshape(shape)
    return jax.lax.reshape(x, shape, out_sharding=_like(x, (*spec[:num_kept], *(None,) * (len(shape) - num_kept))))


def merge_last_axes(x: jax.Array) -> jax.Array:
    """The last two axes as one, laid out as the first of them; with explicit sharding the last one must be whole."""
    shape = (*x.shape[:-2], x.shape[-2] * x.shape[-1])
    spec = explicit_spec(x)
    return x.reshape(shape) if spec is None else jax.lax.reshape(x, shape, out_sharding=_like(x, spec[:-1]))


def merge_axes(x: jax.Array, first: int, number: int) -> jax.Array:
    """`number` axes from `first` on as one, laid out as the first of them; the others are gathered."""
    if number == 1:
        return x
    shape = (*x.shape[:first], math.prod(x.shape[first : first + number]), *x.shape[first + number :])
    spec = explicit_spec(x)
    if spec is None:
        return x.reshape(shape)
    for axis in range(first + 1, first + number):
        x = whole_axis(x, axis)
    return jax.lax.reshape(x, shape, out_sharding=_like(x, (*spec[: first + 1], *spec[first + number :])))


def split_merged(x: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    """The inverse of `merge_axes`: the first of the axes is laid out as all of them were, the others are whole."""
    if len(sizes) == 1:
        return x
    shape = (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
    spec = explicit_spec(x)
    if spec is None:
        return x.reshape(shape)
    spec = (*spec[: axis + 1], *(None,) * (len(sizes) - 1), *spec[axis + 1 :])
    return jax.lax.reshape(x, shape, out_sharding=_like(x, spec))


def whole_axis(x: jax.Array, axis: int) -> jax.Array:
    """With explicit sharding, gathered along an axis."""
    spec = explicit_spec(x)
    if spec is None or spec[axis] is None:
        return x
    return jax.sharding.reshard(x, _like(x, (*spec[:axis], None, *spec[axis + 1 :])))


def whole(x: jax.Array) -> jax.Array:
    """With explicit sharding, gathered along every axis."""
    for axis in range(x.ndim):
        x = whole_axis(x, axis)
    return x


def laid_out_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """With explicit sharding, over the devices as `like` is."""
    spec = explicit_spec(like)
    return x if spec is None or spec == explicit_spec(x) else jax.sharding.reshard(x, _like(like, spec))


def explicit_parts(x: jax.Array) -> tuple[int, ...]:
    """Into how many parts each axis is split over devices, as far as the type of the array tells."""
    spec = explicit_spec(x)
    return (1,) * x.ndim if spec is None else tuple(_num_devices(x, names) for names in spec)


def _num_devices(x: jax.Array, names: str | tuple[str, ...] | None) -> int:
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in _as_tuple(names))


def explicit_spec(x: jax.Array) -> tuple[str | tuple[str, ...] | None, ...] | None:
    """What each axis is laid over; None unless the types of arrays say so."""
    sharding = jax.typeof(x).sharding
    is_explicit = AxisType.Explicit in sharding.mesh.axis_types
    return (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))) if is_explicit else None


def _like(x: jax.Array, spec: tuple[str | tuple[str, ...] | None, ...]) -> NamedSharding:
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else names
