"""The network has the article's layers, for each image size, and its pool is PyTorch's."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import ArticleCNN, average_pool, initialize, training_apply
from tests.daily import daily


@pytest.mark.parametrize("side, channels, features", [(28, 1, 2304), (32, 3, 3136), (8, 1, 64)])
def test_layers_and_shapes(side, channels, features):
    model, shape = ArticleCNN(), (side, side, channels)
    variables = jax.eval_shape(partial(initialize, model, shape, seed=0))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "conv1": {"kernel": (3, 3, channels, 32), "bias": (32,)},
        "conv2": {"kernel": (3, 3, 32, 64), "bias": (64,)},
        "fc1": {"kernel": (features, 100), "bias": (100,)},
        "fc2": {"kernel": (100, 10), "bias": (10,)},
    }
    logits = jax.eval_shape(model.apply, variables, jnp.ones((3, *shape)))
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32


def test_the_seed_draws_the_parameters():
    a, b, c = (initialize(nn.Dense(3), (2, 2, 1), seed=s)["params"]["kernel"] for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)


@pytest.mark.parametrize("size", daily([(4, 4), (8, 12), (7, 9), (5, 11)], [(8, 12), (7, 9)]))
def test_average_pool_drops_what_does_not_fill_a_window(size):
    h, w = size
    x = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
    expected = np.zeros((2, h // 4, w // 4, 3))
    for i in range(h // 4):
        for j in range(w // 4):
            expected[:, i, j] = x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((1, 2))
    # 16 terms of size at most 4, in float32
    np.testing.assert_allclose(average_pool(jnp.asarray(x), 4), expected, atol=16 * 4 * 6e-8)


def test_average_pool_refuses_images_below_the_window():
    with pytest.raises(ValueError, match="4x4 pool does not fit 3x9"):
        average_pool(jnp.zeros((1, 3, 9, 1)), 4)


@pytest.fixture(scope="module")
def normalized():
    """The network with batch normalization and its variables."""
    model = ArticleCNN(batch_norm=True)
    return model, initialize(model, (8, 8, 1), seed=0)


def test_training_moves_the_running_statistics_towards_the_batch(normalized):
    model, variables = normalized
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    _, updates = jax.jit(training_apply(model))(variables, x)
    convolved = jax.lax.conv_general_dilated(
        x,
        variables["params"]["conv1"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # running = 0.9 * 0 + 0.1 * batch mean; the bias starts at 0
    expected = 0.1 * np.asarray(convolved).mean((0, 1, 2))
    np.testing.assert_allclose(updates["batch_stats"]["bn1"]["mean"], expected, atol=1e-6)
    assert set(updates) == {"batch_stats"} and set(updates["batch_stats"]) == {"bn1", "bn2"}


def test_evaluation_of_one_image_does_not_depend_on_the_others(normalized):
    model, variables = normalized
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    other = x.at[1:].multiply(3.0)
    evaluated, trained = jax.jit(model.apply), jax.jit(training_apply(model))
    a, b = evaluated(variables, x), evaluated(variables, other)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.any(trained(variables, x)[0][0] != trained(variables, other)[0][0])


def test_without_batch_normalization_training_updates_nothing():
    model, x = ArticleCNN(), jnp.ones((2, 8, 8, 1))
    shapes = jax.eval_shape(partial(initialize, model, (8, 8, 1), seed=0))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)
    logits, updates = training_apply(model)(variables, x)
    assert updates == {}
    np.testing.assert_array_equal(logits, model.apply(variables, x))
