"""The network of the experiments, unaware of quantization."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ArticleCNN(nn.Module):
    """Two 3x3 convolutions (32, 64 channels, no padding), a 4x4 average pool, two dense layers.

    conv - relu - conv - relu - average_pool - flatten - dense(hidden) - relu - dense(classes), with
    batch normalization after each convolution if asked; the convolutions then have no bias, which
    the batch mean would cancel. 28x28 images give 64 * 6 * 6 features
    after the pool, 32x32 give 64 * 7 * 7, 8x8 give 64. `train=True` normalizes by the batch and
    updates the running statistics, which must then be mutable."""

    batch_norm: bool = False
    classes: int = 10
    channels: tuple[int, int] = (32, 64)
    hidden: int = 100

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        for i, channels in enumerate(self.channels, start=1):
            bias = not self.batch_norm
            x = nn.Conv(channels, (3, 3), padding="VALID", use_bias=bias, name=f"conv{i}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = nn.relu(x)
        x = average_pool(x, 4)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="fc1")(x))
        return nn.Dense(self.classes, name="fc2")(x)


def average_pool(x: Float[Array, "n h w c"], window: int) -> Float[Array, "n p q c"]:
    """Mean over windows that do not overlap: p = h // window, q = w // window, the rest dropped.

    Written as a reshape and a mean: its gradient is a broadcast, faster on CPU than the scatter of
    a window reduction. Raises ValueError if a side is below the window."""
    n, h, w, c = x.shape
    p, q = h // window, w // window
    if not p or not q:
        raise ValueError(f"a {window}x{window} pool does not fit {h}x{w}: images are too small.")
    x = x[:, : p * window, : q * window]
    return x.reshape(n, p, window, q, window, c).mean((2, 4))


def training_apply(model: nn.Module) -> Callable:
    """(variables, x) -> (logits, updates): the forward pass in training mode.

    `updates` holds every collection but `params`, such as `batch_stats`, as the pass leaves it."""

    def apply(variables, x: Array) -> tuple[Array, dict]:
        mutable = [name for name in variables if name != "params"]
        logits, updates = model.apply(variables, x, train=True, mutable=mutable)
        return logits, dict(updates)

    return apply


def initialize(model: nn.Module, shape: tuple[int, ...], *, seed: int) -> dict:
    """The variables of `model` for examples of that shape, drawn by `seed`."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *shape)))
