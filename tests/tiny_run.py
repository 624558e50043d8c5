"""A run of the shared loop that takes a second: its data, its model, its configuration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Dataset, pixel_statistics
from experiments.train import TrainConfig


def make_data(count=43, validation=10, seed=0):
    """Images of 4x4 pixels in three classes, told apart by the brightness of a row."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count + validation).astype(np.int32)
    images = random.integers(0, 100, (count + validation, 4, 4, 1), dtype=np.uint8)
    images[np.arange(len(labels)), labels] += 100
    mean, std = pixel_statistics(images[:count])
    parts = (images[:count], labels[:count], images[count:], labels[count:])
    return Dataset("rows", 3, *parts, *parts[2:], mean, std)


def make_larger_data():
    """The same as 8x8 pixels, which networks of convolutions take; 48 of them are trained on."""
    data = make_data(count=48)
    images = {
        f"{part}_images": np.kron(getattr(data, f"{part}_images"), np.ones((1, 2, 2, 1), np.uint8))
        for part in ("train", "validation", "test")
    }
    return dataclasses.replace(data, **images)


def linear(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["b"]


def zeros():
    return {"w": jnp.zeros((16, 3)), "b": jnp.zeros(3)}


CONFIG = TrainConfig(optimizer=optax.adam(1e-2), epochs=4, batch_size=8)


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
