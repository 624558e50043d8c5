"""Small networks and their quantized changes, for the tests of sensitivity."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (12, 16, 16, 6)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def mlp(seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return {
        f"dense{i}": {"kernel": normal(rng, n, m) * np.sqrt(2 / n), "bias": 0.1 * normal(rng, m)}
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }


def apply(params, x):
    last = len(params) - 1
    for i in range(len(params)):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
        x = jax.nn.relu(x) if i < last else x
    return x


def inputs(seed=0, batches=4, examples=16, size=SIZES[0]):
    rng = np.random.default_rng(100 + seed)
    return [normal(rng, examples, size) for _ in range(batches)]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(z0, z):
    """Mean KL of categorical outputs, in float64."""
    p, q = softmax(np.asarray(z0, np.float64)), softmax(np.asarray(z, np.float64))
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def scanned(params, x):
    x = jax.nn.relu(x @ params["first"]["kernel"])
    x, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["layers"]["kernel"])
    return x @ params["last"]["kernel"]


def scan_params(seed=0, layers=3):
    rng = np.random.default_rng(seed)
    draw = [normal(rng, 16, 16) / 3 for _ in range(layers + 2)]
    return {
        "first": {"kernel": draw[0][:12]},
        "layers": {"kernel": jnp.stack(draw[1:-1])},
        "last": {"kernel": draw[-1][:, :6]},
    }
