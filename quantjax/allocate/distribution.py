"""How far are two outputs apart? By the distribution that they stand for.

The curvature of the Kullback-Leibler divergence in the outputs z is the Fisher matrix S S' of that
distribution; with the Jacobian J of the network, J' S S' J is the Fisher matrix of its parameters,
and the Gauss-Newton matrix of the negative log-likelihood. Martens 2014, arXiv:1412.1193."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Outputs = Float[Array, "*batch n"]


class _Divergence(Protocol):
    def __call__(self, reference: Outputs, outputs: Outputs) -> Float[Array, "*batch"]: ...


class _Factor(Protocol):
    def __call__(self, reference: Outputs, v: Outputs) -> Outputs: ...


class Distribution(NamedTuple):
    """divergence: KL(reference || outputs) of every example. half: S'v, so that |S'v|^2 / 2 is the
    divergence of a small change v. spread: S v; of signs v at random it is a change of covariance
    S S'."""

    divergence: _Divergence
    half: _Factor
    spread: _Factor


def _divergence(reference: Outputs, outputs: Outputs) -> Float[Array, "*batch"]:
    here, there = jax.nn.log_softmax(reference), jax.nn.log_softmax(outputs)
    return jnp.sum(jnp.exp(here) * (here - there), -1)


def _half(reference: Outputs, v: Outputs) -> Outputs:
    p = jax.nn.softmax(reference)
    return jnp.sqrt(p) * (v - jnp.sum(p * v, -1, keepdims=True))


def _spread(reference: Outputs, v: Outputs) -> Outputs:
    p = jax.nn.softmax(reference)
    root = jnp.sqrt(p)
    return root * v - p * jnp.sum(root * v, -1, keepdims=True)


# Logits along the last axis: S = diag(sqrt p) - p sqrt(p)'.
categorical = Distribution(_divergence, _half, _spread)

# Means of variance one: KL = |z - z0|^2 / 2 and S = 1.
gaussian = Distribution(
    lambda reference, outputs: jnp.sum((outputs - reference) ** 2, -1) / 2,
    lambda reference, v: v,
    lambda reference, v: v,
)
