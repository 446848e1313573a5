"""The networks have the published numbers of parameters, and BatchNorm in the right mode."""

import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx
from models.resnet import Residual, ResNet
from models.wide_resnet import WideResNet


def num_params(build) -> int:
    """Counted on shapes alone: nothing is allocated."""
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vgg-16", 14_728_266),
        ("vgg-c", 10_537_034),  # SNIP, table 1: 10.5 million
        ("resnet-18", 11_173_962),
        ("resnet-34", 21_282_122),
        ("resnet-50", 23_520_842),
        ("wide-resnet-28-4", 5_849_050),
    ],
)
def test_cifar_networks_have_the_published_size(name, published):
    assert num_params(lambda: models.build(name, (32, 32, 3), 10, rngs=nnx.Rngs(0))) == published


@pytest.mark.parametrize(("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_imagenet_resnets_have_the_published_size(depth, published):
    assert num_params(lambda: ResNet(depth, 3, 1000, stem="imagenet", rngs=nnx.Rngs(0))) == published


def test_wide_resnet_28_10_has_the_published_size():
    assert num_params(lambda: WideResNet(28, 10, 3, 10, rngs=nnx.Rngs(0))) == 36_479_194


def test_mlp_has_a_kernel_a_bias_and_a_norm_for_each_hidden_layer():
    expected = 784 * 300 + 300 * 100 + 100 * 10 + 3 * (300 + 100) + 10
    assert num_params(lambda: models.build("mlp", (28, 28, 1), 10, rngs=nnx.Rngs(0))) == expected


@pytest.mark.parametrize("name", models.Name.__args__)
def test_every_network_gives_logits(name):
    model = nnx.eval_shape(lambda: models.build(name, (32, 32, 3), 7, width=0.25, rngs=nnx.Rngs(0)))
    for train in (True, False):
        logits = jax.eval_shape(lambda model, train=train: model(jnp.zeros((2, 32, 32, 3)), train), model)
        assert logits.shape == (2, 7)


def test_imagenet_stem_divides_the_image_by_four_before_the_first_block(monkeypatch):
    seen, call = [], Residual.__call__

    def recording_call(self, x, train):
        seen.append(x.shape)
        return call(self, x, train)

    monkeypatch.setattr(Residual, "__call__", recording_call)
    model = ResNet(18, 3, 5, width=1 / 32, stem="imagenet", rngs=nnx.Rngs(0))
    jax.eval_shape(lambda x: model(x, False), jnp.zeros((1, 64, 64, 3)))
    assert seen[0] == (1, 16, 16, 2) and seen[-1] == (1, 2, 2, 16)


def test_batch_norm_learns_in_training_mode_only():
    model = models.build("mlp", (4, 4, 1), 3, hidden=(5,), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))

    def stats():
        return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]

    before = stats()
    model(images, train=False)
    for left, right in zip(before, stats(), strict=True):
        np.testing.assert_array_equal(left, right)
    hidden = model.linears[0](images.reshape(8, 16))
    model(images, train=True)
    np.testing.assert_allclose(model.norms[0].mean[...], 0.1 * hidden.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vgg-c", {}, "needs 32 x 32 pixels, got 8 x 8"),
        ("resnet-18", {"width": 1 / 1000}, "leaves no channel"),
        ("wide-resnet-28-4", {"width": 1 / 1000}, "leaves no channel"),
        ("mlp", {"hidden": (4, 0)}, r"got \(4, 0\)"),
        ("alexnet", {}, "there is no network 'alexnet'"),
    ],
)
def test_impossible_network_is_an_error(name, settings, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, (8, 8, 1), 10, **settings, rngs=nnx.Rngs(0))
