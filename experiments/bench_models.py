"""Which functions does the benchmark of inference run? Each case a function, floats and inputs.

Weights and inputs are drawn at random: time does not depend on what a network has learned. The
networks know nothing of quantization."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models import ArticleCNN, initialize

LAYERS, WIDTH, HEADS, TOKENS, VOCABULARY = 6, 512, 8, 256, 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """`apply(params, *args)`. from_memory: so that no cache holds the weights, calls take turns
    over copies of them. module: the Linen module of `apply`, if it is one."""

    name: str
    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    from_memory: bool = False
    module: nn.Module | None = None


class MLP(nn.Module):
    """`blocks` times: dense(inner) - relu - dense(outer)."""

    blocks: int = 4
    outer: int = 1024
    inner: int = 4096

    @nn.compact
    def __call__(self, x: Float[Array, "n outer"]) -> Float[Array, "n outer"]:
        for i in range(self.blocks):
            x = nn.relu(nn.Dense(self.inner, name=f"up{i}")(x))
            x = nn.Dense(self.outer, name=f"down{i}")(x)
        return x


def transformer(
    params: dict, tokens: Int[Array, "b t"], cache: list
) -> tuple[Float[Array, "b v"], list]:
    """The logits after the last token, and each layer's keys and values of these tokens.

    cache: those of the `c` tokens before, (b, c, heads, width / heads); c is 0 at first, so one
    function both reads a prompt and decodes. Pre-normalized, rotary positions, one embedding
    table for tokens and logits."""
    table = params["embedding"]
    x = jnp.take(table, tokens, axis=0)
    found = []
    for layer, (past_k, past_v) in zip(params["layers"], cache, strict=True):
        y = _normalized(x, layer["norm1"]["scale"])
        q, k, v = (_heads(y @ layer[name]["kernel"]) for name in ("query", "key", "value"))
        q, k = _rotated(q, past_k.shape[1]), _rotated(k, past_k.shape[1])
        keys, values = jnp.concatenate([past_k, k], 1), jnp.concatenate([past_v, v], 1)
        y = jax.nn.dot_product_attention(q, keys, values, mask=_causal(q.shape[1], keys.shape[1]))
        x = x + y.reshape(x.shape) @ layer["out"]["kernel"]
        y = _normalized(x, layer["norm2"]["scale"])
        x = x + jax.nn.gelu(y @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
        found.append((k, v))
    return _normalized(x[:, -1], params["norm"]["scale"]) @ table.T, found


def _heads(x: Array) -> Float[Array, "b t h d"]:
    return x.reshape(*x.shape[:2], HEADS, -1)


def _normalized(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _causal(tokens: int, keys: int) -> Array:
    return jnp.tril(jnp.ones((tokens, keys), bool), keys - tokens)[None, None]


def _rotated(x: Float[Array, "b t h d"], start: int) -> Array:
    half = x.shape[-1] // 2
    rates = 1e4 ** -(jnp.arange(half) / half)
    angles = (start + jnp.arange(x.shape[1]))[:, None, None] * rates
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def transformer_params(
    width: int = WIDTH, vocabulary: int = VOCABULARY, layers: int = LAYERS
) -> dict:
    """Normal weights, of the deviation that keeps the size of activations."""
    keys = iter(jax.random.split(jax.random.key(0), 6 * layers + 1))
    draw = lambda i, o: jax.random.normal(next(keys), (i, o)) / i**0.5  # noqa: E731
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    norm = {"scale": jnp.ones(width)}
    layer = lambda: {name: {"kernel": draw(*shape)} for name, shape in shapes.items()}  # noqa: E731
    return {
        "embedding": draw(vocabulary, width),
        "layers": [{**layer(), "norm1": norm, "norm2": norm} for _ in range(layers)],
        "norm": norm,
    }


def empty_cache(width: int = WIDTH, layers: int = LAYERS) -> list:
    """Of no tokens."""
    nothing = jnp.zeros((1, 0, HEADS, width // HEADS))
    return [(nothing, nothing)] * layers


def _product(rows: int, side: int, *, from_memory: bool = False) -> Case:
    name = f"{rows} x {side} x {side}" + (", from memory" if from_memory else "")
    params = {"kernel": jax.random.normal(jax.random.key(0), (side, side)) / side**0.5}
    x = jax.random.normal(jax.random.key(1), (rows, side))
    return Case(name, lambda p, x: x @ p["kernel"], params, (x,), from_memory)


def _mlp(batch: int) -> Case:
    module, x = MLP(), jax.random.normal(jax.random.key(1), (batch, MLP.outer))
    params = jax.jit(module.init)(jax.random.key(0), x)
    return Case(f"MLP, batch {batch}", module.apply, params, (x,), module=module)


def _cnn(batch: int) -> Case:
    module, x = ArticleCNN(), jax.random.normal(jax.random.key(1), (batch, 28, 28, 1))
    params = initialize(module, (28, 28, 1), seed=0)
    return Case(f"article's CNN, batch {batch}", module.apply, params, (x,))


def _transformer(*, decode: bool) -> Case:
    params, cache = transformer_params(), empty_cache()
    tokens = jax.random.randint(jax.random.key(1), (1, TOKENS), 0, VOCABULARY)
    if not decode:
        return Case(f"transformer, {TOKENS} tokens", transformer, params, (tokens, cache))
    _, cache = jax.jit(transformer)(params, tokens[:, :-1], cache)
    return Case("transformer, one token", transformer, params, (tokens[:, -1:], cache))


# By the name that `--cases` takes; made when asked for, as some take hundreds of megabytes.
CASES: dict[str, Callable[[], Case]] = {
    **{f"product{m}": functools.partial(_product, m, 1024) for m in (1, 8, 32, 512)},
    **{f"memory{m}": functools.partial(_product, m, 4096, from_memory=True) for m in (1, 8)},
    "product2048": functools.partial(_product, 2048, 2048),
    **{f"mlp{n}": functools.partial(_mlp, n) for n in (1, 32, 256)},
    "cnn": functools.partial(_cnn, 256),
    "decode": functools.partial(_transformer, decode=True),
    "prefill": functools.partial(_transformer, decode=False),
}
