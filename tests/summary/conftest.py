"""The parameters and statistics of a small CNN, which many reports are about."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.interpret.models import filled


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="session")
def variables():
    return filled(jax.eval_shape(CNN().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
