"""Which scales lose least of a layer's output, rather than of its weights?

For one output channel with weights w and inputs x, E(w.x - v.x)^2 = (w - v)' H (w - v) with
H = E[x x']. Every shrunken copy of the widest range is tried; the codes are those of plain
rounding, and the scale is then fitted to them: s = (l' H w) / (l' H l) for levels l. Needs a few
thousand inputs and no labels. It is the layer-wise objective of Nagel et al. 2020,
arXiv:2004.10568, equation 8, applied to the scale alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import quantjax as qj
from quantjax.scales import inverse

FRACTIONS = np.geomspace(1.3, 0.05, 160).astype(np.float32)


def second_moments(
    model: nn.Module, variables: Any, images: Float[Array, "n h w c"], *, batch: int = 256
) -> dict[str, Float[Array, "i i"]]:
    """H = E[x x'] of the inputs of every convolution and dense layer, by layer name.

    A convolution's input is its unfolded window, in the order of its kernel's axes."""

    @jax.jit
    def one(variables: Any, x: Array) -> dict[str, Array]:
        found = {}

        def record(call, args, kwargs, context):
            module = context.module
            if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense):
                x_TI = _unfolded(module, args[0])
                found["/".join(module.path)] = x_TI.T @ x_TI / x_TI.shape[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            model.apply(variables, x)
        return found

    parts = [one(variables, images[i : i + batch]) for i in range(0, len(images), batch)]
    weights = np.array([len(images[i : i + batch]) for i in range(0, len(images), batch)])
    weights = weights / weights.sum()
    return jax.tree.map(lambda *h: sum(w * a for w, a in zip(weights, h, strict=True)), *parts)


def _unfolded(module: nn.Module, x: Array) -> Float[Array, "t i"]:
    if isinstance(module, nn.Dense):
        return x.reshape(-1, x.shape[-1])
    height, width = module.kernel_size
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    windows = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.stack(windows, -2).reshape(-1, height * width * x.shape[-1])


def with_output_scales(params: Any, policy: qj.Policy, moments: dict[str, Array]) -> Any:
    """`quantize(params, policy)`, with the kernels of known layers by the output's error."""
    quantized = qj.quantize(params, policy)
    layers = dict(quantized["params"])
    for name, h_II in moments.items():
        kernel = layers[name]["kernel"]
        if isinstance(kernel, qj.QTensor):
            found = _search(params["params"][name]["kernel"], h_II, kernel)
            layers[name] = {**layers[name], "kernel": found}
    return {**quantized, "params": layers}


@jax.jit
def _search(w: Array, h_II: Float[Array, "i i"], like: qj.QTensor) -> qj.QTensor:
    """The codes and scales of one kernel whose last axis is the output, in integer levels."""
    grid, shape = like.format, (1,) * (w.ndim - 1) + w.shape[-1:]
    assert isinstance(grid, qj.IntFormat)
    w_IO = w.reshape(-1, w.shape[-1])
    widest = jnp.abs(w_IO).max(0) / grid.max_level
    hw_IO = h_II @ w_IO

    def levels(step_O: Array) -> Array:
        return grid.decode(grid.encode(w_IO * inverse(step_O)))

    def fitted(step_O: Array) -> tuple[Array, Array]:
        l_IO = levels(step_O)
        top, bottom = (l_IO * hw_IO).sum(0), (l_IO * (h_II @ l_IO)).sum(0)
        scale_O = jnp.where((bottom > 0) & (top > 0), top / jnp.maximum(bottom, 1e-30), step_O)
        d_IO = l_IO * scale_O - w_IO
        return (d_IO * (h_II @ d_IO)).sum(0), scale_O

    def body(best: tuple[Array, Array, Array], fraction: Array):
        error, scale = fitted(widest * fraction)
        better = error < best[0]
        step = jnp.where(better, widest * fraction, best[1])
        return (jnp.minimum(error, best[0]), step, jnp.where(better, scale, best[2])), None

    start = (jnp.full(widest.shape, jnp.inf), widest, widest)
    (_, step_O, scale_O), _ = lax.scan(body, start, jnp.asarray(FRACTIONS))
    rounding = dataclasses.replace(like, scale=step_O.reshape(shape))
    codes = qj.quantize({"kernel": w}, like={"kernel": rounding})["kernel"]
    return dataclasses.replace(codes, scale=scale_O.reshape(shape))
