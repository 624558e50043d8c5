"""How much of a product's output is left when weights are quantized? Its SQNR, in two ways.

10 log10(sum y^2 / sum (yhat - y)^2) over the outputs y of all products that use a layer's weights.
Local: yhat = its quantized weights on the float model's inputs. Accumulated: the whole model
quantized, so that its inputs carry what all layers before it lost."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.interpret.evaluate import Machine
from quantjax.interpret.once import Frame, jit_once, taken_apart
from quantjax.interpret.param import Param
from quantjax.interpret.pieces import arguments
from quantjax.interpret.products import PRODUCTS
from quantjax.interpret.program import Equation, Leaf, flatten, layer_of, read
from quantjax.interpret.record import Record
from quantjax.paths import named_leaves


def product_errors(
    apply: Callable[..., Any], params: Any, trees: dict[str, Any], batch: Any
) -> dict[str, dict[str, tuple[float, ...]]]:
    """By format and by name of a layer ('path' or 'path/[i]'): local and accumulated SQNR in dB.

    `trees` are like `params`, with everything quantized that the format quantizes, as floats.
    Products inside what can not be opened (`quantjax.interpret.program`) are not seen."""
    floats, frame = taken_apart(params)
    beside, others = taken_apart(arguments(batch))
    run = jit_once(_energies, apply, frame, others)
    out = {}
    for label, tree in trees.items():
        energies = jax.device_get(run(floats, taken_apart(tree)[0], beside))
        out[label] = {
            name: tuple(_decibels(float(signal), float(e)) for e in (local, accumulated))
            for name, (signal, local, accumulated) in energies.items()
        }
    return out


def _decibels(signal: float, error: float) -> float:
    if not error:
        return float("inf")
    return float(10 * np.log10(signal / error)) if signal else float("-inf")


def _energies(
    apply: Callable[..., Any],
    frame: Frame,
    others: Frame,
    floats: list[Any],
    quantized: list[Any],
    beside: list[Any],
) -> dict[str, jax.Array]:
    """By layer: the energy of its products, and of their two errors. frame, others: of the
    parameters, whose arrays are `floats` or `quantized`, and of the arguments, `beside`."""
    program = flatten(apply, frame.filled(floats), *others.filled(beside))
    machine = Machine(Record())
    envs = [dict(zip(program.arguments, beside, strict=True)) for _ in range(2)]
    trees = [dict(named_leaves(frame.filled(x))[0]) for x in (floats, quantized)]
    found: dict[str, jax.Array] = {}
    for step in program.instructions:
        inputs = [
            [read(machine, x, functools.partial(_leaf, tree), env) for x in step.inputs]
            for tree, env in zip(trees, envs, strict=True)
        ]
        outs = [step.run(machine, given) for given in inputs]
        for env, out in zip(envs, outs, strict=True):
            env.update(zip(step.outputs, out, strict=True))
        name = _weight(step, inputs[0])
        if name is None:
            continue
        mixed = [q if isinstance(q, Param) else x for x, q in zip(*inputs, strict=True)]
        y, accumulated = (out[0].astype(jnp.float32) for out in outs)
        local = step.run(machine, mixed)[0].astype(jnp.float32)
        energy = jnp.stack([jnp.sum(e**2) for e in (y, local - y, accumulated - y)])
        found[name] = found[name] + energy if name in found else energy
    return found


def _leaf(tree: dict[str, Any], leaf: Leaf) -> Any:
    return layer_of(tree[leaf.path], leaf.layer)


def _weight(step: Any, inputs: list[Any]) -> str | None:
    """The name of the layer if this is its product with an activation."""
    if not isinstance(step.run, Equation) or step.run.eqn.primitive.name not in PRODUCTS:
        return None
    used = [x for x in inputs if isinstance(x, Param)]
    return used[0].path if len(used) == 1 else None
