"""Linear regression, whose gradients NumPy has in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Regression:
    """Batches of linear regression with a weight matrix and a bias, and their gradients in float64."""

    def __init__(self, num_batches: int = 12, batch_size: int = 5, offset: float = 0.0):
        rng = np.random.default_rng(0)
        self.inputs = rng.normal(size=(num_batches, batch_size, 3)) + offset
        self.targets = rng.normal(size=(num_batches, batch_size, 2))
        self.new = {"bias": rng.normal(size=2), "kernel": rng.normal(size=(3, 2))}
        self.old = {"bias": rng.normal(size=2), "kernel": rng.normal(size=(3, 2))}
        self.masks = {"bias": None, "kernel": np.array([[True, False], [False, True], [True, True]])}

    @property
    def batches(self):
        return jnp.asarray(self.inputs), jnp.asarray(self.targets)

    @staticmethod
    def loss_fn(params, batch):
        inputs, targets = batch
        return jnp.mean(jnp.sum((inputs @ params["kernel"] + params["bias"] - targets) ** 2, axis=-1)) / 2

    def losses(self, point: dict) -> np.ndarray:
        """[N]."""
        residuals = self.inputs @ point["kernel"] + point["bias"] - self.targets
        return np.mean(np.sum(residuals**2, axis=-1), axis=-1) / 2

    def gradients(self, point: dict, masked: bool = False) -> dict[str, np.ndarray]:
        """Of each batch: leaves flattened, [N, ...]."""
        residuals = self.inputs @ point["kernel"] + point["bias"] - self.targets
        batch_size = self.inputs.shape[1]
        kernel = np.einsum("nbi,nbo->nio", self.inputs, residuals) / batch_size
        if masked:
            kernel = kernel * self.masks["kernel"]
        return {"bias": residuals.mean(axis=1), "kernel": kernel.reshape(len(kernel), -1)}


@pytest.fixture
def regression(x64) -> Regression:
    del x64
    return Regression()


@pytest.fixture
def offset_regression() -> Regression:
    """Gradients whose mean is a thousand times their deviation: sums of squares would cancel in float32."""
    return Regression(offset=100.0)


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
