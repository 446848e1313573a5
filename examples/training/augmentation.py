"""The augmentation of the paper: a random shift and a random reflection, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def augment(key: jax.Array, images: jax.Array, *, shift: int, flip: bool) -> jax.Array:
    """Images [B, H, W, C] padded with `shift` zeros and cropped at random; mirrored with probability 1/2."""
    if shift:
        key, shift_key = jax.random.split(key)
        offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * shift + 1)
        padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:])

        images = jax.vmap(crop)(padded, offsets)
    if flip:
        is_mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
        images = jnp.where(is_mirrored, images[:, :, ::-1], images)
    return images
