"""A small decoder as current language models are built, unaware of quantization.

Touvron et al., "LLaMA", 2023, arXiv:2302.13971: RMSNorm before each part, SwiGLU, no biases;
Su et al., "RoFormer", 2021, arXiv:2104.09864: rotary positions;
Ainslie et al., "GQA", 2023, arXiv:2305.13245: groups of query heads share a key and value head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder. mixed: products with weights multiply in bfloat16 and sum in float32,
    which trains faster; all else, and the parameters, are float32."""

    vocabulary: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 4
    key_value_heads: int = 2
    hidden: int = 512
    rotary_base: float = 10_000.0
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads) or self.heads % self.key_value_heads:
            raise ValueError(
                f"width {self.width} must divide by twice the heads ({self.heads}), and these by "
                f"the key and value heads ({self.key_value_heads})."
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def rotate(x: Float[Array, "b t *heads d"], base: float) -> Float[Array, "b t *heads d"]:
    """Turns the pairs (x_i, x_{i + d/2}) of position t by the angle t * base^(-2i/d).

    A product of a turned query and a turned key depends on the distance of their positions."""
    half = x.shape[-1] // 2
    angles_TF = jnp.outer(
        jnp.arange(x.shape[1], dtype=jnp.float32),
        base ** (-jnp.arange(half, dtype=jnp.float32) / half),
    )
    shape = (x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles_TF).reshape(shape), jnp.sin(angles_TF).reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; query head i reads the key and value head i // (heads / kv heads)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        narrow = config.key_value_heads * config.head_width
        self.query = _linear(config.width, config.width, config, rngs)
        self.key = _linear(config.width, narrow, config, rngs)
        self.value = _linear(config.width, narrow, config, rngs)
        self.out = _linear(config.width, config.width, config, rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        c = self.config
        b, t, _ = x.shape
        shared = c.heads // c.key_value_heads
        # b examples, t and s positions, k key heads, g queries of each, d features
        q = self.query(x).reshape(b, t, c.key_value_heads, shared, c.head_width)
        k = self.key(x).reshape(b, t, c.key_value_heads, c.head_width)
        v = self.value(x).reshape(b, t, c.key_value_heads, c.head_width)
        q, k = rotate(q, c.rotary_base), rotate(k, c.rotary_base)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) * c.head_width**-0.5
        seen = jnp.tril(jnp.ones((t, t), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return self.out(mixed.reshape(b, t, c.width))


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config.width, config.hidden, config, rngs)
        self.up = _linear(config.width, config.hidden, config, rngs)
        self.down = _linear(config.hidden, config.width, config, rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """Token ids to the logits of each next token; the embedding is the output matrix too."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mixed = config.mixed

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if self.mixed:
            return _product(x, self.embedding.embedding[...].T)
        return self.embedding.attend(x)


def initialize(config: DecoderConfig, *, seed: int) -> dict[str, Any]:
    """The parameters of a decoder as nested dicts, drawn by `seed`."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(seed))))


def forward(
    config: DecoderConfig, params: dict[str, Any], tokens: Int[Array, "b t"]
) -> Float[Array, "b t v"]:
    """The logits of each next token, as a pure function."""
    return module(config, params)(tokens)


def module(config: DecoderConfig, params: dict[str, Any]) -> Decoder:
    """The decoder that holds these parameters."""
    graph, state = _skeleton(config)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params)))


@functools.cache
def _skeleton(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def _linear(inputs: int, outputs: int, config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Linear:
    multiply = _mixed_dot_general if config.mixed else jax.lax.dot_general
    return nnx.Linear(inputs, outputs, use_bias=False, dot_general=multiply, rngs=rngs)


def _half(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x: Float[Array, "*n i"], w: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """x @ w from bfloat16 factors. The two products of its gradient are made the same way, which
    JAX's own rule, of one float32 factor, would not."""
    return _half(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _product_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    g_TO, x_TI = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return _half(g_TO, w.T).reshape(x.shape), _half(x_TI.T, g_TO)


_product.defvjp(_product_forward, _product_backward)


def _mixed_dot_general(x: Array, w: Array, dimension_numbers: Any, **_: Any) -> Array:
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"expected a product of rows and a matrix, got {dimension_numbers}.")
    return _product(x, w)
